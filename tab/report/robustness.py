"""What robustness.json of the runs holds, as a table, in words and as curves over severity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..analysis.attacks import AUTO, EPSILON, STEPS
from ..analysis.corruptions import OFFICIAL, OWN, SEVERITIES
from ..compare.runs import Run
from .attacks import attack_table
from .averages import Mean
from .cache_budget import cache_table
from .pictures import curves
from .tables import markdown_lines
from .text import code, title

SETS = {"cifar10c": ("CIFAR-10-C", OFFICIAL), "own": ("corruptions (not CIFAR-10-C)", tuple(OWN))}
Found = dict[str, dict]  # robustness.json of one run
Value = Callable[[Found, Found | None], float | None]  # of a run and the control of its seed


def robustness_section(runs: list[Run], measured: dict[str, Found], left: list[str]) -> str:
    """A table for each model; "" where nothing but noise was measured. measured, left: from
    `keep_comparable`."""
    done = {run.id: (run, measured[run.id]) for run in runs if run.id in measured}
    parts, everything = [], []
    for model in dict.fromkeys(run.model for run, _ in done.values()):
        mine = [(run, found) for run, found in done.values() if run.model == model]
        everything += [found for _, found in mine]
        tables = [table for table in (_table(mine), attack_table(mine), cache_table(mine)) if table]
        if tables:
            parts += [f"**{model.upper()}**", *tables]
    if parts:
        parts += [_words(everything), *_suspicious(done)]
    if left:
        parts.append("**Left out, as it was not measured as the others:**\n" + "\n".join(left))
    return "\n\n".join(["## Robustness", *parts]) if parts else ""


def _table(mine: list[tuple[Run, Found]]) -> str:
    control = {run.seed: found for run, found in mine if run.attention == "none"}
    columns: dict[str, Value] = {
        "ECE": _at("calibration", "ece"),
        "Mirrored too": _at("mirrored", "accuracy"),
        "FGSM": _at("attacks", "fgsm"),
        f"PGD-{STEPS}": _at("attacks", "pgd"),
        "random ±ε": _at("attacks", "random"),
        **{f"AutoAttack {255 * e:.0f}/255": _auto(i) for i, e in enumerate(AUTO)},
        "CIFAR-10.1": _at("cifar10.1", "accuracy"),
    }
    for key, (name, kinds) in SETS.items():
        columns[name[0].upper() + name[1:]] = _corrupted(key, kinds)
        columns["mCE" if key == "cifar10c" else "error / control's"] = _errors_ratio(key, kinds)
        columns["relative mCE" if key == "cifar10c" else "loss / control's"] = _losses_ratio(
            key, kinds
        )
    lines = []
    for attention in dict.fromkeys(run.attention for run, _ in mine):
        pairs = [(f, control.get(r.seed)) for r, f in mine if r.attention == attention]
        line = [title(attention)]
        for value in columns.values():
            numbers = [x for pair in pairs if (x := value(*pair)) is not None]
            line.append(mean.show(".1f", 100) if (mean := Mean.of(numbers)) else "–")
        lines.append(line)
    header = ["Attention", *columns]
    shown = [i for i in range(len(header)) if any(line[i] != "–" for line in lines)]
    if shown == [0]:
        return ""
    return markdown_lines([header[i] for i in shown], [[x[i] for i in shown] for x in lines])


def _at(section: str, key: str) -> Value:
    return lambda found, _: found.get(section, {}).get(key)


def _auto(place: int) -> Value:
    return lambda found, _: (
        found["autoattack"]["accuracy"][place] if "autoattack" in found else None
    )


def _corrupted(key: str, kinds: tuple[str, ...]) -> Value:
    return lambda found, _: corrupted(found, key, kinds)


def _errors_ratio(key: str, kinds: tuple[str, ...]) -> Value:
    return lambda found, control: corruption_error(found, control or {}, key, kinds)


def _losses_ratio(key: str, kinds: tuple[str, ...]) -> Value:
    return lambda found, control: relative_corruption_error(found, control or {}, key, kinds)


def _errors(found: Found, key: str, kinds: tuple[str, ...]) -> list[list[float]] | None:
    """Of each kind, at each severity; None unless all were measured."""
    sections = [found.get(f"{key}/{kind}") for kind in kinds]
    if not all(sections):
        return None
    return [[1 - accuracy for accuracy in section["accuracy"]] for section in sections]


def corrupted(found: Found, key: str, kinds: tuple[str, ...]) -> float | None:
    """Mean accuracy over kinds and severities."""
    errors = _errors(found, key, kinds)
    return errors and 1 - sum(map(sum, errors)) / (len(kinds) * SEVERITIES)


def corruption_error(
    found: Found, control: Found, key: str, kinds: tuple[str, ...]
) -> float | None:
    """mCE: the mean over kinds of Σ_s error / Σ_s error of the control (Hendrycks & Dietterich
    2019, section 4.2, with our control in the place of AlexNet)."""
    errors, base = _errors(found, key, kinds), _errors(control, key, kinds)
    if not errors or not base or not all(map(sum, base)):
        return None
    return sum(sum(e) / sum(b) for e, b in zip(errors, base, strict=True)) / len(kinds)


def relative_corruption_error(
    found: Found, control: Found, key: str, kinds: tuple[str, ...]
) -> float | None:
    """Relative mCE: the mean over kinds of Σ_s (error − clean error) / the same of the control,
    what corruption costs whatever the clean accuracy (ibid.); None if it costs the control nothing.
    """
    errors, base = _errors(found, key, kinds), _errors(control, key, kinds)
    if not errors or not base or "noise" not in found or "noise" not in control:
        return None
    clean, clean_base = (1 - f["noise"]["accuracy"][0] for f in (found, control))  # σ = 0
    lost = [sum(e) - SEVERITIES * clean for e in errors]
    lost_base = [sum(e) - SEVERITIES * clean_base for e in base]
    if min(lost_base) <= 0:
        return None
    return sum(a / b for a, b in zip(lost, lost_base, strict=True)) / len(kinds)


def _words(everything: list[Found]) -> str:
    text = "In per cent, means over seeds ± half a 95 % t-interval. ECE: expected calibration error"
    text += " on the clean test set, 15 bins."
    if any("mirrored" in found for found in everything):
        text += " Mirrored too: accuracy from the mean logits of each test image and its mirror"
        text += " image (test-time augmentation), which no other accuracy here makes use of."
    if counts := {f["attacks"]["images"] for f in everything if "attacks" in f}:
        images = " or ".join(f"{n:,}" for n in sorted(counts))
        text += (
            f" FGSM, PGD-{STEPS}: accuracy on {images} test images under L∞ attacks of "
            f"ε = {255 * EPSILON:.0f}/255 in pixel space, in eval mode, all weights known to the "
            "attacker; random: a coin for each pixel in place of an attack."
        )
    for key, (name, kinds) in SETS.items():
        if any(_errors(found, key, kinds) for found in everything):
            text += f" {name[0].upper()}{name[1:]}: mean accuracy over {len(kinds)} kinds "
            text += f"({', '.join(kinds)}) at {SEVERITIES} severities; then the error over the "
            text += "control's, mean over kinds (mCE against our control, not AlexNet), and the "
            text += "accuracy lost to them over the control's loss (relative mCE)."
    return text


def _suspicious(done: dict[str, tuple[Run, Found]]) -> list[str]:
    seen = {name: f["attacks"]["suspicions"] for name, (_, f) in done.items() if "attacks" in f}
    if not seen:
        return []
    runs: dict[str, list[str]] = {}
    for name, words in seen.items():
        if words:
            runs.setdefault("; ".join(words), []).append(code(name))
    lines = [f"- {words}: {', '.join(names)}" for words, names in runs.items()]
    if not lines:
        return [
            "No sign of masked gradients: PGD does at least what FGSM does, both more than chance, "
            "an attack without a bound leaves nothing right, gradients do not vanish."
        ]
    head = "**Signs of masked gradients: these attack accuracies are no measure of robustness.**"
    return [head + "\n\n" + "\n".join(lines)]


def severities(found: dict[str, Found]) -> tuple[str, int, dict[str, list[float]]] | None:
    """(name of the set, its kinds, run id -> mean accuracy in per cent at severity 1, 2, …) of the
    official arrays, else of our own; None if nothing was measured."""
    for key, (name, kinds) in SETS.items():
        errors = {i: e for i, f in found.items() if (e := _errors(f, key, kinds))}
        if errors:
            means = {i: (100 * (1 - np.mean(e, axis=0))).tolist() for i, e in errors.items()}
            return name, len(kinds), means
    return None


def severity_points(means: dict[str, list[float]]) -> Callable[[Run], tuple[list, list]]:
    """What `curves` draws."""
    levels = list(range(1, SEVERITIES + 1))
    return lambda run: (levels, means[run.id]) if run.id in means else ([], [])


def severity_picture(path: Path, runs: list[Run], found: dict[str, Found]) -> str:
    """Mean accuracy over kinds against severity -> its caption, "" if nothing was measured."""
    measured = severities(found)
    if not measured:
        return ""
    name, count, means = measured
    mine = [run for run in runs if run.id in means]
    labels = {"heading": name, "xlabel": "severity", "ylabel": "test accuracy (%)"}
    curves(path, mine, severity_points(means), **labels)
    return f"Test accuracy under {name}, mean over {count} kinds"
