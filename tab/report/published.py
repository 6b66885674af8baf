"""Beside the published study: what a comparison under the recipe `published` found, at the end and
epoch by epoch."""

from __future__ import annotations

from pathlib import Path

from matplotlib.ticker import MaxNLocator

from ..compare.runs import Run
from ..recipe.published import EPOCHS, NEAR, curves
from .chart_data import Group
from .pictures import averaged, drawn, measured
from .style import figure, look
from .tables import Mean, markdown_lines
from .text import plain, title

HEADING = "Beside the published figures"
MARKS = (1, 2, 5, 10, 20, 50, 100)  # epochs of the table
PARTS = ("test", "train")
Pair = tuple[str, str]  # model, attention
Lines = dict[str, list[float]]  # of test and train: per cent after epoch 1, 2, …


def published_section(runs: list[Run], note: str) -> str:
    """All published figures, ours beside them, how many of ours lie near, and the way there; ""
    without any."""
    lines, near, compared, epochs = [], 0, 0, set()
    for (model, attention), curve in curves().items():
        mine = [r for r in runs if (r.model, r.attention) == (model, attention) and r.scored]
        epochs |= {len(run.rows) for run in mine}
        test, train = (
            Mean.of([run.summary[f"final_{part}_accuracy"] for run in mine]) for part in PARTS
        )
        cells = [model.upper(), title(attention), _percent(curve.test[-1]), "–", "–", "–"]
        cells += [_percent(curve.train[-1]), "–"]
        if test:
            difference = test.value - curve.test[-1]
            inside = abs(difference) <= NEAR
            compared, near = compared + 1, near + inside
            cells[3:6] = [test.show(".1f", 100), f"{100 * difference:+z.1f}", _yes(inside)]
            cells[7] = train.show(".1f", 100)
        elif begun := [r for r in runs if (r.model, r.attention) == (model, attention) and r.rows]:
            cells[3] = begun[0].state
        lines.append(cells)
    parts = []
    if compared:
        header = ["Model", "Attention", "Published test", "Test here", "Difference", "Near"]
        header += ["Published train", "Train here"]
        words = _words(near, compared, len(lines), epochs)
        parts += [words, markdown_lines(header, lines)]
    if pairs := beside(runs):
        parts += [_by_epoch(pairs)]
    if not parts:
        return ""
    return "\n\n".join([f"## {HEADING}", *parts, f"Data: {plain(note)}."])


def _words(near: int, compared: int, count: int, epochs: set[int]) -> str:
    text = (
        f"{near} of {compared} test accuracies lie within "
        f"{100 * NEAR:g} points of the published ones"
    )
    left = count - compared
    text += f"; {left} of {count} were not run to the end." if left else "."
    if epochs != {EPOCHS}:
        ran = ", ".join(map(str, sorted(epochs)))
        text += f" **These runs had {ran} epochs, the published ones {EPOCHS}.**"
    return f"{text} Final epoch, in per cent; the published ones are of one seed."


def beside(runs: list[Run]) -> dict[Pair, tuple[Lines, Lines]]:
    """(model, attention) -> ours, means over seeds, and the published ones over the same epochs.
    Runs that were stopped count as far as they came."""
    found, runs = {}, drawn(runs)
    for pair, curve in curves().items():
        mine = [run for run in runs if (run.model, run.attention) == pair]
        lines = {k: averaged(mine, measured("epoch", f"{k}_accuracy", 100.0)) for k in PARTS}
        # Scored after each epoch, or there is nothing to hold against the published curve.
        if not all(lines.values()) or lines["test"][0][0] != 1:
            continue
        ours = {k: line[1].mean(0).tolist()[:EPOCHS] for k, line in lines.items()}
        n = len(ours["test"])
        found[pair] = ours, {k: [100 * a for a in getattr(curve, k)[:n]] for k in PARTS}
    return found


def _by_epoch(pairs: dict[Pair, tuple[Lines, Lines]]) -> str:
    longest = max(len(ours["test"]) for ours, _ in pairs.values())
    marks, lines = [mark for mark in MARKS if mark <= longest], []
    for (model, attention), (ours, theirs) in pairs.items():
        apart = [a - b for a, b in zip(ours["test"], theirs["test"], strict=True)]
        most = max(range(len(apart)), key=lambda i: abs(apart[i]))
        here = "here" if len(apart) == EPOCHS else f"here, {len(apart)} epochs"
        rows = {
            here: (ours["test"], ".1f", "–"),
            "published": (theirs["test"], ".1f", "–"),
            "difference": (apart, "+z.1f", f"{apart[most]:+z.1f} (epoch {most + 1})"),
        }
        for what, (values, form, last) in rows.items():
            cells = [f"{values[m - 1]:{form}}" if m <= len(values) else "–" for m in marks]
            lines.append([model.upper(), title(attention), what, *cells, last])
    header = ["Model", "Attention", "Test accuracy", *(f"Epoch {m}" for m in marks)]
    table = markdown_lines([*header, "Largest"], lines)
    words = "Test accuracy (%) after an epoch; the largest difference is over all epochs run."
    return f"{words}\n\n{table}"


def published_charts(pairs: dict[Pair, tuple[Lines, Lines]]) -> Group:
    """A chart for each: ours drawn through, the published dashed, both in the mechanism's colour;
    training thinner."""
    found = []
    for (model, attention), (ours, theirs) in pairs.items():
        series = [
            {
                "key": attention,
                "x": list(range(1, len(line[part]) + 1)),
                "y": [round(value, 3) for value in line[part]],
                "look": {
                    "name": f"{part}, {who}",
                    "dash": "5 4" if line is theirs else "",
                    "width": 2 if part == "test" else 1,
                },
            }
            for part in PARTS
            for who, line in (("here", ours), ("published", theirs))
        ]
        heading = f"{model.upper()}: {title(attention)}"
        chart = {"title": heading, "xlabel": "epoch", "ylabel": "accuracy (%)", "series": series}
        found.append({**chart, "kind": "curves", "shared": True, "own": True})
    note = "Drawn through: here, means over seeds; dashed: published. Thick: test; thin: training."
    return Group(HEADING, note, found, small=len(found) > 2)


def published_picture(path: Path, pairs: dict[Pair, tuple[Lines, Lines]]) -> None:
    """The same for report.md, a panel for each."""
    names = [attention for _, attention in pairs]
    columns = 3 if len(pairs) > 2 else len(pairs)
    size = {"width": 3.8, "height": 2.9} if columns > 2 else {"width": 6.4, "height": 4.2}
    with figure(path, len(pairs), columns=columns, **size) as (fig, axes):
        fig.subplots_adjust(wspace=0.22, hspace=0.42)
        for ax, ((model, attention), both) in zip(axes, pairs.items(), strict=True):
            colour = look(attention, names)["color"]
            for who, lines in zip(("here", "published"), both, strict=True):
                dash = "-" if who == "here" else (0, (4, 2.5))
                for part in PARTS:
                    x, width = range(1, len(lines[part]) + 1), 1.8 if part == "test" else 0.9
                    style = {"color": colour, "linestyle": dash, "linewidth": width}
                    style["marker"] = "o" if len(x) == 1 else None
                    ax.plot(x, lines[part], label=f"{part}, {who}", **style)
            ax.set(xlabel="epoch", ylabel="accuracy (%)")
            ax.set_title(f"{model.upper()}: {title(attention)}", fontsize=10)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0].legend(fontsize=8, frameon=False)


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


def _yes(inside: bool) -> str:
    return "yes" if inside else "no"
