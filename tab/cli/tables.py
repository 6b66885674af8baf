"""The tables of the terminal, each as narrow as its answer: the rest stands in report.html, in the
CSV files and in the JSON of --json."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from ..analysis.one_variant import Layer
from ..analysis.same_function import Identity
from ..compare.disturbance import LIMIT
from ..report.averages import Mean
from ..report.sweep import Trials
from ..report.tables import Standing, versus
from ..report.tasks import Answer
from ..report.text import title
from ..sweep.trials import Pair, RungTrial, winner_of
from .answer import table

# --- a comparison ---------------------------------------------------------------------------------


def ranked_table(entries: list[Standing], heading: str) -> Table:
    """One model's rows, the best first: test accuracy, difference from the control, verdict and
    training time over the control's."""
    heads = ("Attention", "Test %", "vs control", "Verdict", "Time")
    made = table(heading, *heads, right=("Test %", "vs control", "Time"), note=_note(entries))
    for entry in entries:
        control, best = entry.attention == "none", entry.rank == 1
        made.add_row(
            title(entry.attention),
            entry.test.show(".1f", 100) if entry.test else entry.notes,
            versus(entry),
            (entry.verdict and entry.verdict.verdict) or "–",
            _ratio(entry),
            style="bold" if best else "cyan" if control else None,
        )
    return made


def _ratio(entry: Standing) -> str:
    if entry.ratio is None:
        return "–"
    return f"{entry.ratio.value:.2f}×" + "*" * entry.ratio.disturbed


def _note(entries: list[Standing]) -> str:
    several = any(entry.test and entry.test.half is not None for entry in entries)
    lines = ["vs control: points of test accuracy. Time: of training, the control's is 1."]
    if several:
        lines.append("±: 95 % intervals; those of vs control hold together.")
    if any(entry.ratio and entry.ratio.disturbed for entry in entries):
        lines.append(f"*: disturbed by other work on the machine, by more than {LIMIT:g}×.")
    lacking: dict[str, list[str]] = {}  # of what rows lack it: many lack the same seeds
    for entry in entries:
        if entry.test and entry.notes:
            lacking.setdefault(entry.notes, []).append(title(entry.attention))
    lines += [f"{', '.join(names)}: {notes}." for notes, names in lacking.items()]
    return "\n".join(lines)


def ranked_rows(entries: list[Standing]) -> list[dict]:
    """The same for --json, with all that a verdict rests on; accuracies from 0 to 1."""
    return [
        {
            "model": entry.model,
            "attention": entry.attention,
            "title": title(entry.attention),
            "rank": entry.rank or None,
            "seeds": len(entry.runs),
            "notes": entry.notes,
            **(entry.verdict.columns() if entry.verdict else {}),
            "time_ratio": entry.ratio and entry.ratio.value,
            "time_disturbed": entry.ratio and entry.ratio.disturbed,
            **{name: entry.value(name) for name in entry.averages},
        }
        for entry in entries
    ]


# --- numbers of tokens ----------------------------------------------------------------------------


def lengths_table(lines: list[dict]) -> Table:
    """Accuracy and a training step for each mechanism and N; what nobody measured is left out."""
    shows = {
        "Test %": lambda x: Mean(x["accuracy"], x["accuracy_half"]).show(".1f", 100),
        "Step ms": lambda x: f"{x['step_ms']:.3g}",
        "Peak MB": lambda x: f"{x['step_peak_mb']:.0f}",
        "PyTorch ms": lambda x: f"{x['eager_ms']:.3g}",
    }
    keys = dict(zip(shows, ("accuracy", "step_ms", "step_peak_mb", "eager_ms"), strict=True))
    heads = [h for h in shows if any(line.get(keys[h]) is not None for line in lines)]
    models = list(dict.fromkeys(line["model"] for line in lines))
    made = table("Lengths", *["Model"] * (len(models) > 1), "Attention", "N", *heads,
                 right=("N", *heads))  # fmt: skip
    for line in lines:
        cells = [shows[h](line) if line.get(keys[h]) is not None else "–" for h in heads]
        first = [line["model"].upper()] * (len(models) > 1)
        made.add_row(*first, title(line["attention"]), str(line["tokens"]), *cells)
    return made


def tasks_table(found: list[Answer]) -> Table:
    """What each mechanism answers of a generated task, beside what it can by construction."""
    heads = ("Task", "Attention", "N", "Right %", "At most %", "Found")
    made = table("Tasks", *heads, right=("N", "Right %", "At most %"))
    for each in found:
        mean = Mean(each.accuracy, each.accuracy_half).show(".1f", 100)
        limit = f"{100 * each.ceiling:.1f}" if each.why else "–"
        made.add_row(each.task, title(each.attention), str(each.tokens), mean, limit, each.found)
    return made


# --- the identity check ---------------------------------------------------------------------------


def identity_tables(found: Identity) -> Iterable[Table]:
    """One for each model."""
    for model in dict.fromkeys(layer.model for layer in found.layers):
        mine = [layer for layer in found.layers if layer.model == model]
        tokens = sorted({layer.tokens for layer in mine})
        heading = f"{model.upper()}, tokens: {' or '.join(map(str, tokens))}"
        heads = ("Attention", "Width", "Parameters", "Same function as", "What it lacks")
        made = table(heading, *heads, right=("Width", "Parameters"))
        for layer in mine:
            made.add_row(
                title(layer.attention),
                str(layer.width),
                f"{layer.parameters:,}",
                _twin(layer, found),
                _lacks(layer),
            )
        yield made


def _twin(layer: Layer, found: Identity) -> str:
    for group in found.twins():
        if group.model == layer.model and layer.attention in group.attentions[1:]:
            return title(group.attentions[0])
    return "–"


def _lacks(layer: Layer) -> str:
    parts = [f"no gradient: {', '.join(layer.idle)}"] if layer.idle else []
    parts += ["only affine"] if layer.affine else []
    parts += [f"only a bias: {', '.join(layer.biases)}"] if layer.biases else []
    parts += [] if layer.meet else ["tokens never meet"]
    return "; ".join(parts) or "–"


# --- a sweep --------------------------------------------------------------------------------------


def sweep_table(
    found: Trials, rungs: tuple[int, ...], heading: str, shares: dict[Pair, dict[str, float]]
) -> Table:
    """One line for each pair: the best validation accuracy of each rung, and the configuration that
    won. rungs: the epoch at which each ends. shares: how much each option decides the accuracy at
    the first rung (`PairRecord.importance`)."""
    matters = any(shares.values())
    heads = ("Model", "Attention", "Best %", "Winner", *["What matters"] * matters)
    note = f"Best %: validation accuracy after {', '.join(map(str, rungs))} epochs."
    if matters:
        note += " What matters: shares of the variance after the first of them (fANOVA)."
    note += "".join(f"\n{line}" for pair, trials in found.items() if (line := _lost(pair, trials)))
    made = table(heading, *heads, note=note)
    for (model, attention), trials in found.items():
        won = winner_of(trials)
        share = sorted(shares.get((model, attention), {}).items(), key=lambda item: -item[1])
        made.add_row(
            model.upper(),
            title(attention),
            " → ".join(_best(trials, epochs) for epochs in rungs),
            won.chosen() or "nothing was drawn" if won else "–",
            *[", ".join(f"{name} {x:.2f}" for name, x in share) or "–"] * matters,
        )
    return made


def _best(trials: list[RungTrial], epochs: int) -> str:
    scores = [t.score for t in trials if t.epochs == epochs and t.score is not None]
    return f"{100 * max(scores):.1f}" if scores else "–"


def _lost(pair: Pair, trials: list[RungTrial]) -> str:
    counts = {s: sum(t.status == s for t in trials) for s in ("diverged", "failed")}
    text = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
    return f"{pair[0].upper()} {title(pair[1])}: {text}." if text else ""


def sweep_rows(found: Trials) -> dict[Pair, dict]:
    """The same for --json; scores from 0 to 1."""
    rows = {}
    for (model, attention), trials in found.items():
        won = winner_of(trials)
        rows[model, attention] = {
            "model": model,
            "attention": attention,
            "score": won and won.score,
            "configuration": won.params if won else None,
            "diverged": sum(t.status == "diverged" for t in trials),
            "failed": sum(t.status == "failed" for t in trials),
        }
    return rows
