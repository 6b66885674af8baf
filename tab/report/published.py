"""Beside the published figures: what a comparison under the recipe `published` found."""

from __future__ import annotations

from ..published import EPOCHS, NEAR, figures
from ..results import Run
from .tables import Mean, markdown_lines, title


def published_section(runs: list[Run], note: str) -> str:
    """All published figures, ours beside them, and how many of ours lie near; "" without any."""
    lines, near, compared, epochs = [], 0, 0, set()
    for (model, attention), figure in figures().items():
        mine = [r for r in runs if (r.model, r.attention) == (model, attention) and r.scored]
        epochs |= {len(run.rows) for run in mine}
        test, train = (
            Mean.of([run.summary[f"final_{part}_accuracy"] for run in mine])
            for part in ("test", "train")
        )
        cells = [model.upper(), title(attention), _percent(figure.test_accuracy), "–", "–", "–"]
        cells += [_percent(figure.train_accuracy), "–"]
        if test:
            difference = test.value - figure.test_accuracy
            inside = abs(difference) <= NEAR
            compared, near = compared + 1, near + inside
            cells[3:6] = [test.show(".1f", 100), f"{100 * difference:+.1f}", _yes(inside)]
            cells[7] = train.show(".1f", 100)
        lines.append(cells)
    if not compared:
        return ""
    header = ["Model", "Attention", "Published test", "Here", "Difference", "Near"]
    header += ["Published train", "Here"]
    table = markdown_lines(header, lines)
    return "\n\n".join([_words(near, compared, len(lines), epochs, note), table])


def _words(near: int, compared: int, count: int, epochs: set[int], note: str) -> str:
    text = (
        f"## Beside the published figures\n\n{near} of {compared} test accuracies lie within "
        f"{100 * NEAR:g} points of the published ones"
    )
    text += f"; {count - compared} of {count} were not run." if compared < count else "."
    if epochs != {EPOCHS}:
        ran = ", ".join(map(str, sorted(epochs)))
        text += f" **These runs had {ran} epochs, the published ones {EPOCHS}.**"
    return f"{text} Final epoch, in per cent; the published ones are of one seed. Data: {note}."


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


def _yes(inside: bool) -> str:
    return "yes" if inside else "no"
