"""Gathers what a comparison's directory holds, draws the pictures, writes report.md and .html."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from .. import files
from ..analysis.robustness import is_measured, measure, weights_of
from ..analysis.robustness_file import read
from ..analysis.same_function import Identity, identity
from ..compare.plan import Grid
from ..compare.runs import Run, read_runs
from ..data.load import Dataset
from ..data.splits import split_batches
from ..layers import known_layer
from ..recipe.recipe import load_recipe
from ..sweep.trials import read_trials
from ..train.facts import made_with
from ..train.loop import has_weights, load_trained
from . import markdown, pictures
from .attacks import attack_picture
from .chart_data import NOTE, Group, charts, looks, tradeoff_group
from .comparable import keep_comparable
from .forest import forest_group, forest_picture
from .html import html_page
from .published import beside, published_charts, published_picture, published_section
from .robustness import robustness_section, severity_picture
from .same_function import identity_section
from .sweep import sweep_charts, sweep_section, told
from .tables import ranking
from .tuning import tuning_section
from .weights import attention_picture, attention_weights, filters_picture

Progress = Callable[[int, int, str], None]  # (done, total, what)


LOST = (
    "**Without weights:** the model.safetensors of {} of {} runs are not in this directory. What "
    "needs a trained model, such as its accuracy under noise, leaves these out."
)

WAITING = (
    "**Being measured:** the accuracy under noise of {} of {} runs. The report is written anew, "
    "with it and with all pictures, when that is done."
)

# Of report.html, which draws the others from their numbers.
EMBEDDED = ("attention", "filters")


def write_report(
    out: Path,
    dataset: Dataset,
    *,
    bench: Path | None = None,
    sweep: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Draws everything anew from `out`; nothing is trained. -> the path of report.md

    Where something is left to measure, which takes the longest, both are written before it, too.
    The accuracy under noise is measured once for each run and kept beside it (robustness.json);
    what `tab robustness` measured beside it is shown too. bench: a folder with the JSON of
    `tab bench`, whose tables report.html then holds. sweep: the directory of a sweep, shown too.
    """
    facts = made_with(out, dataset)
    grid = Grid.load(out)
    if sweep is None and grid.tune and (out / "tuning" / "trials.csv").exists():
        sweep = out / "tuning"
    trials = read_trials(sweep) if sweep else {}
    runs = read_runs(out, grid)
    done = [run for run in runs if run.status == "done"]
    folder = files.folder(out / "pictures")
    curves = pictures.drawn(runs)
    # Robustness is of images, and so are pictures of a model; both need its weights.
    images = [run for run in done if has_weights(run.path) and not dataset.sequences]
    ranked = {model: ranking(runs, model) for model in grid.models}
    recipe = load_recipe((out / "config.toml").resolve())
    alike = identity(recipe, grid.models, grid.attentions, classes=grid.classes)
    twins, before = alike.twins(), _sections(runs, grid, dataset, alike)
    if lost := [] if dataset.sequences else [run.id for run in done if run not in images]:
        before.append(LOST.format(len(lost), len(done)))
    after = [tuning_section(trials, grid)] if grid.tune and trials else []
    after += [sweep_section(trials, told(sweep))] if trials else []
    names = looks([*grid.attentions, *(attention for _, attention in trials)])

    def write(found: dict, left: list[str], shown: dict[str, str], *waiting: str) -> Path:
        sections = [*before, *waiting, robustness_section(runs, found, left), *after]
        path = out / "report.md"
        files.write(path, markdown.report(runs, facts, grid, shown, sections, twins).encode())
        groups = [forest_group(ranked), tradeoff_group(runs, found)]
        groups = [*filter(None, groups), *_groups(runs, curves, grid, found)]
        groups += [sweep_charts(trials)] if trials else []
        embedded = {folder / f"{k}.png": v for k, v in shown.items() if k.startswith(EMBEDDED)}
        words = markdown.report(runs, facts, grid, {}, sections, twins)
        text = html_page(words, names, groups, embedded, bench)
        files.write(out / "report.html", text.encode())
        return path

    models = {run.id: weights_of(run.path) for run in images}
    if waiting := [run for run in images if not is_measured(run.path, dataset, models[run.id])]:
        known = {run.id: read(run.path) for run in images if run not in waiting}
        found, left = keep_comparable(known, models)
        write(found, left, {}, WAITING.format(len(waiting), len(images)))
    found = _measured(images, models, dataset, grid, progress)
    found, left = keep_comparable(found, models)
    if progress:
        progress(len(images), len(images), "pictures")
    shown = _from_numbers(folder, runs, grid) if curves else {}
    if images:
        shown |= _from_models(folder, images, found, dataset)
    for model, entries in ranked.items():
        if caption := forest_picture(folder / f"forest_{model}.png", model, entries):
            shown[f"forest_{model}"] = caption
    if costs := tradeoff_group(runs, found):
        shown["costs"] = pictures.tradeoffs(folder / "costs.png", costs.charts, grid.attentions)
    return write(found, left, shown)


def _measured(
    done: list[Run],
    models: dict[str, str],
    dataset: Dataset,
    grid: Grid,
    progress: Progress | None,
) -> dict[str, dict]:
    """run id -> its robustness.json, with the accuracy under noise. models: run id -> the sum of
    its weights."""
    found = {}
    for i, run in enumerate(done):
        if progress:
            progress(i, len(done), f"noise: {run.id}")
        # It may have been trained on another machine.
        device = grid.device if torch.cuda.is_available() else "cpu"
        found[run.id] = measure(run.path, dataset, None, device=device, weights=models[run.id])
    return found


def _groups(runs: list[Run], curves: list[Run], grid: Grid, found: dict[str, dict]) -> list[Group]:
    """The charts of report.html, but for those of a sweep."""
    groups = [Group("Charts", NOTE, charts(runs, curves, _part(curves), found))] if curves else []
    if pairs := beside(runs) if grid.recipe == "published" else {}:
        groups.insert(0, published_charts(pairs))
    return groups


def _sections(runs: list[Run], grid: Grid, dataset: Dataset, found: Identity) -> list[str]:
    sections = [identity_section(found, runs)]
    if grid.recipe == "published":
        sections.insert(0, published_section(runs, dataset.note))
    return sections


def _from_numbers(folder: Path, runs: list[Run], grid: Grid) -> dict[str, str]:
    """Curves and bars; -> picture name -> caption."""
    entries = {model: ranking(runs, model) for model in grid.models}
    pairs = beside(runs) if grid.recipe == "published" else {}
    runs = pictures.drawn(runs)
    part = _part(runs)
    accuracy = f"{part} accuracy"
    pictures.per_epoch(folder / "loss.png", runs, "train_loss", "training loss", "cross-entropy")
    key = f"{part}_accuracy"
    pictures.per_epoch(folder / "accuracy.png", runs, key, accuracy, f"{accuracy} (%)", 100.0)
    heading = f"{accuracy} against time"
    pictures.against_time(folder / "time.png", runs, key, heading, f"{accuracy} (%)")
    shown = {
        "loss": "Training loss per epoch",
        "accuracy": f"{accuracy.capitalize()} per epoch",
        "time": f"{accuracy.capitalize()} against training time",
    }
    slow = any(e.seconds and e.seconds.disturbed for mine in entries.values() for e in mine)
    shown["time"] += pictures.STARRED * slow
    for model, mine in entries.items():
        if any(entry.test for entry in mine):
            pictures.bars(folder / f"{model}_results.png", mine, model.upper())
            caption = f"{model.upper()}: final test accuracy and training time"
            caption += pictures.STARRED * any(e.seconds and e.seconds.disturbed for e in mine)
            shown = {f"{model}_results": caption, **shown}
    if pairs:
        published_picture(folder / "published.png", pairs)
        shown = {"published": "Accuracy per epoch here and as published (dashed)", **shown}
    return shown


def _from_models(
    folder: Path, done: list[Run], found: dict[str, dict], dataset: Dataset
) -> dict[str, str]:
    """What trained models do on worse images, and their weights; -> picture name -> caption."""
    heading = f"accuracy against input noise ({len(dataset.test):,} test images)"
    noise = {name: f["noise"] for name, f in found.items() if "noise" in f}
    pictures.noise(folder / "noise.png", done, noise, heading)
    shown = {"noise": "Test accuracy against Gaussian noise on the input"}
    drawn = {"severity": severity_picture, "pgd": attack_picture}
    for name, draw in drawn.items():
        if caption := draw(folder / f"{name}.png", done, found):
            shown[name] = caption
    for model in dict.fromkeys(run.model for run in done):
        shown |= _from_weights(folder, [r for r in done if r.model == model], dataset)
    return shown


def _part(runs: list[Run]) -> str:
    """The part of the data whose accuracy is known for each epoch."""
    scored = sum(row["test_accuracy"] is not None for row in runs[0].rows)
    return "test" if scored > 1 or len(runs[0].rows) == 1 else "validation"


def _from_weights(folder: Path, runs: list[Run], dataset: Dataset) -> dict[str, str]:
    """Attention matrices and filters of one model, from the first finished seed of each mechanism,
    for the first test image."""
    maps, filters, model_name = {}, {}, runs[0].model
    first = {run.attention: run for run in reversed(runs)}
    absent = [attention for attention in first if known_layer(attention) is None]
    for attention in dict.fromkeys(r.attention for r in runs if r.attention not in absent):
        run = first[attention]
        model, config = load_trained(run.path)
        x, _ = next(iter(split_batches(config, dataset, torch.device("cpu"))[2].epoch(0)))
        maps[run.attention] = attention_weights(model, x[:1])
        filters[run.attention] = model.filters()
    if not maps:
        return {}
    label = dataset.classes[dataset.test.labels[0]]
    what = f"{model_name.upper()}: attention of token j (column) in output i (row), one image"
    image = dataset.test.images[0]
    attention_picture(folder / f"attention_{model_name}.png", maps, image, f"{what} ({label})")
    heading = f"{model_name.upper()}: filters of the first layer, the strongest"
    filters_picture(folder / f"filters_{model_name}.png", filters, heading)
    left_out = f"; not installed here, and so not drawn: {', '.join(absent)}" if absent else ""
    strongest = min(24, len(next(iter(filters.values()))))
    return {
        f"attention_{model_name}": f"{what}; up to four heads, square-root scale{left_out}",
        f"filters_{model_name}": f"{heading} {strongest}{left_out}",
    }
