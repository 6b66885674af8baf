"""`tab bench steps`: whole training steps of the study's models, images per second.

A step is what training does with one batch: forward, loss, backward, AdamW, `after_step`. The
batch stays the same and is made of noise, so assembling it takes no part (bench/bench_batches.py
times that). Contestants at one model, in turns:

    none            the control: no attention
    tab NAME        the model with that mechanism
    eager NAME      its twin: the same weights, but the layer attends in plain PyTorch, by the
                    function of tab/bench/ops/; everything around it is the same code
    free NAME       the same once more, but the layer attends at no cost, to nothing: the ceiling
                    of what any kernel could reach (`--ceiling`)

With patches of 4, 2 and 1 pixels the vit has 64, 256 and 1024 tokens: time and memory against N, on
the same images. The case of a vit names its N.

A mechanism whose layer runs no kernel of TAB (multi_head, linformer, …) is PyTorch already and has
no twin. The experts of deepseek_mla are such a part, in both. A twin whose attention or gradients
differ from the layer's is not timed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..bench.benchmark import Benchmark
from ..bench.measure import take_turns
from ..bench.peak_memory import in_its_own_process, known_peak
from ..bench.registry import benchmarks
from ..bench.rows import Row, worst_of
from ..models.image_model import ImageModel, build_model
from ..recipe.recipe import Recipe, load_recipe
from ..train.steps import Steps
from ..train.training_run import place

CLASSES = 10
TOLERANCE = 1e-3  # of the largest value, float32
SCHEDULE = 10**6  # steps of the learning rate's schedule: more than are ever timed


class Subject(NamedTuple):
    """Whose steps are measured: a model, as a recipe builds it."""

    recipe: Recipe
    model: str

    @property
    def name(self) -> str:
        config = self.recipe.run_config(self.model, "none", 0)
        length = f"n{config.tokens}/" if self.model == "vit" else ""
        return f"steps/{self.model}/{length}{self.recipe.name}"


def subjects(
    recipe: str, models: list[str], patches: Iterable[int] = (), changes: Mapping | None = None
) -> list[Subject]:
    """Each model, and the vit once for each size of patches. changes: of the recipe, by key.

    ValueError: patches, and no vit among the models.
    """
    changes, patches = dict(changes or {}), list(patches)
    if patches and "vit" not in models:
        raise ValueError(
            f"--patch {','.join(map(str, patches))} is of the vit, and the models are "
            f"{', '.join(models)}; give --models vit"
        )
    own = [{"model.vit.patch": patch} for patch in patches] or [{}]
    return [
        Subject(load_recipe(recipe, {**changes, **more}), model)
        for model in models
        for more in (own if model == "vit" else [{}])
    ]


def steps(
    subject: Subject,
    attentions: list[str],
    *,
    batch: int | None = None,
    device: str = "cpu",
    ceiling: bool = False,
    budget: float = 3.0,
    min_rounds: int = 5,
    max_rounds: int = 50,
) -> list[Row]:
    """The control, then each mechanism and its twin; seconds["step"]. batch: else the recipe's.
    ceiling: a twin that attends at no cost, too."""
    batch = batch or _batch(subject)
    x, y = _images(subject, batch, device)
    rows, calls = [], {}
    for name in ["none", *(a for a in attentions if a != "none")]:
        config = subject.recipe.run_config(subject.model, name, 0)
        ours = place(build_model(config, CLASSES), torch.device(device))
        contestants = {label_of(name): ours}
        other = twin(ours)
        errors: tuple[float | None, float | None] = (None, None)
        if other is not None:
            errors = difference(ours, other, x)
            contestants[f"eager {name}"] = other
            if ceiling:
                contestants[f"free {name}"] = twin(ours, "free")
        for label, net in contestants.items():
            row = Row(f"{subject.name}/b{batch}", label, batch=batch, tokens=config.tokens)
            rows.append(row)
            if label.startswith("eager"):
                row.error, row.gradient_error = errors
                if not (worst := worst_of(errors)) <= TOLERANCE:
                    row.skipped = f"wrong: differs from the layer by {worst:.1e}"
                    continue
            learn = Steps(net, config.train, SCHEDULE, torch.device(device)).learn
            calls[label] = (lambda: None, lambda _, learn=learn: learn([(x, y)]))
    times, pace = take_turns(calls, device, budget, min_rounds, max_rounds, None, 0)
    for row in rows:
        if row.contestant in times:
            row.timed("step", times[row.contestant], pace)
    return rows


def label_of(attention: str) -> str:
    """The row of its model with TAB's own kernels."""
    return attention if attention == "none" else f"tab {attention}"


def _batch(subject: Subject) -> int:
    return subject.recipe.run_config(subject.model, "none", 0).train.batch_size


def _images(subject: Subject, batch: int, device: str) -> tuple[Tensor, Tensor]:
    generator, side = torch.Generator().manual_seed(0), subject.recipe.data().size
    x = torch.randn(batch, 3, side, side, generator=generator).to(device)
    y = torch.randint(0, CLASSES, (batch,), generator=generator).to(device)
    return x.contiguous(memory_format=torch.channels_last), y


# --- memory ---------------------------------------------------------------------------------------


def add_memory(rows: list[Row], subject: Subject, device: str = "cpu") -> None:
    """The peak of each contestant's first step, in a process of its own: the model, its optimizer
    and all that forward and backward hold, above what the process held before."""
    for row in rows:
        if row.skipped is None:
            what = f"{row.contestant} at {row.case}"
            given = subject, row.contestant, row.batch, device
            row.peak_bytes = in_its_own_process(what, _peak, *given)


def _peak(subject: Subject, contestant: str, batch: int, device: str) -> int:
    who, _, name = contestant.rpartition(" ")
    config = subject.recipe.run_config(subject.model, name, 0)

    def build() -> Steps:
        model = build_model(config, CLASSES)
        model = twin(model, who) if who in TWINS else model
        return Steps(place(model, torch.device(device)), config.train, 10, torch.device(device))

    build().learn([_images(subject, 1, device)])  # libraries and thread stacks are there then
    images = _images(subject, batch, device)
    return known_peak((build, lambda steps: steps.learn([images])), device)


# --- twins ----------------------------------------------------------------------------------------


TWINS = {"eager": "use_pytorch", "free": "use_nothing"}  # of a Benchmark


def twin(model: ImageModel, who: str = "eager") -> ImageModel | None:
    """A copy whose layers attend in plain PyTorch, or at no cost; None where they run no op of
    TAB."""
    other = copy.deepcopy(model)
    found = [attending(layer) for layer in other.layers()]
    if None in found:
        return None
    for benchmark, part in found:
        getattr(benchmark, TWINS[who])(part)
    return other


def attending(layer: nn.Module) -> tuple[Benchmark, nn.Module] | None:
    """The op that a layer runs, and the module in it that attends by it."""
    for benchmark in benchmarks().values():
        part = benchmark.part(layer)
        if part is not None:
            return benchmark, part
    return None


def difference(ours: ImageModel, other: ImageModel, x: Tensor) -> tuple[float, float]:
    """Of attention and of its gradients (tokens, parameters), relative to the largest value.

    At the attention itself: at first a residual block multiplies what it says by 0.
    """
    with torch.no_grad():
        tokens = ours.tokens(x[:8]).detach()  # (8, N, C)
    found = [_attention(model, tokens) for model in (ours, other)]
    errors = [
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        for a, b in zip(*found, strict=True)
    ]
    return errors[0], worst_of(errors[1:])


def _attention(model: ImageModel, tokens: Tensor) -> list[Tensor]:
    _, part = attending(model.attention)
    tokens = tokens.clone().requires_grad_()
    out = part(tokens)
    out = out[0] if isinstance(out, tuple) else out
    weight = torch.linspace(-1, 1, out.shape[-1], device=out.device)
    leaves = [tokens, *part.parameters()]
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]
