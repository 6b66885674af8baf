"""Seeds an hour, one by one against S at once: python bench/seeds.py [S] [ROUNDS] [SIZE …]

Each size is a recipe and a model (default: fair mlp, fair cnn, published mlp, published cnn, quick
mlp, quick cnn), with each of two attentions. The two ways take turns: S seeds of `STEPS` training
steps each (after one untimed step), on drawn images; the ratio is taken within a round.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from tab.machine import keep_freed_memory
from tab.models.image_model import build_model
from tab.models.stacked import stack
from tab.recipe.recipe import load_recipe
from tab.train.steps import Steps
from tab.train.together import SeedSteps

SIZES = ["fair-mlp", "fair-cnn", "published-mlp", "published-cnn", "quick-mlp", "quick-cnn"]
ATTENTIONS = ["none", "multi_head"]
IMAGES = {"fair": 40_000, "published": 50_000, "quick": 6000}  # of an epoch
STEPS = {"fair": 1, "published": 1, "quick": 4}


class Ways:
    """S seeds of one variant, both ways, each with its own models and batches."""

    def __init__(self, recipe: str, model: str, attention: str, seeds: int, device: torch.device):
        found = load_recipe(recipe)
        configs = [found.run_config(model, attention, s) for s in range(seeds)]
        self.config, self.steps = configs[0], STEPS[recipe]
        b, count = self.config.train.batch_size, 10_000
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(seeds * b, 3, 32, 32, generator=generator)
        x = x.to(device, memory_format=torch.channels_last)
        y = torch.randint(0, 10, (seeds * b,), generator=generator).to(device)

        def models():
            made = (build_model(config, 10) for config in configs)
            return [m.to(device, memory_format=torch.channels_last) for m in made]

        options = self.config.train
        self.alone = [Steps(m, options, count, device) for m in models()]
        self.parts = list(zip(x.chunk(seeds), y.chunk(seeds), strict=True))
        self.group = SeedSteps(stack(models()), options, count, device)
        self.group.model.start(range(seeds), device)
        self.batch = x, y

    def one_by_one(self, steps: int) -> None:
        for run, batch in zip(self.alone, self.parts, strict=True):
            run.learn([batch] * steps)

    def at_once(self, steps: int) -> None:
        self.group.learn([self.batch] * steps)


def main() -> None:
    seeds, rounds = (int(word) for word in [*sys.argv[1:3], "5", "5"][:2])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    if device.type == "cpu":
        keep_freed_memory()  # as training does
    print(f"{name}, {torch.get_num_threads()} threads, {seeds} seeds, median of {rounds} rounds")
    print("seeds an hour                     one by one    at once    ratio [least – most]")
    for size in sys.argv[3:] or SIZES:
        recipe, model = size.split("-")
        for attention in ATTENTIONS:
            ways = Ways(recipe, model, attention, seeds, device)
            times: dict[str, list[float]] = {"one_by_one": [], "at_once": []}
            for _ in range(rounds + 1):
                for way, found in times.items():
                    start = time.perf_counter()
                    getattr(ways, way)(ways.steps)
                    found.append(time.perf_counter() - start)
            alone, group = (found[1:] for found in times.values())  # the first was to warm up
            epochs, batch = ways.config.train.epochs, ways.config.train.batch_size
            whole = epochs * (IMAGES[recipe] // batch) / ways.steps  # such rounds a training
            hour = [3600 * seeds / (statistics.median(t) * whole) for t in (alone, group)]
            ratios = sorted(a / g for a, g in zip(alone, group, strict=True))
            print(
                f"{recipe:10s} {model:4s} {attention:12s} {hour[0]:15.2f} {hour[1]:10.2f}    "
                f"{statistics.median(ratios):.2f} [{ratios[0]:.2f} – {ratios[-1]:.2f}]",
                flush=True,
            )


if __name__ == "__main__":
    main()
