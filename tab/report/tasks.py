"""The generated tasks (tab/data/sequences.py) in one table, mechanism × N: what was found, beside
what each mechanism cannot do by construction (tab/analysis/ceiling.py)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from ..analysis.ceiling import ceiling
from ..compare.csv_files import write_csv
from ..data.sequences import draw, parse
from ..files import folder, write_text
from ..train.run_files import read_config
from .averages import Mean
from .lengths import Trained
from .tables import markdown_lines
from .text import title

SOLVED = 0.95  # from here on a task counts as solved


@dataclass(frozen=True)
class Answer:
    """One mechanism on one task at one N. accuracy_half: of the 95 % interval over seeds."""

    task: str
    attention: str
    tokens: int
    seeds: int
    accuracy: float
    accuracy_half: float | None
    ceiling: float  # what at most can be expected of it
    why: str  # what keeps it there; "" where nothing does
    found: str  # "solved", "not solved", "as predicted" or "above its ceiling"

    @property
    def cell(self) -> str:
        mean = Mean(self.accuracy, self.accuracy_half).show(".1f", 100)
        limit = f"; at most {self.ceiling:.1%}, {self.why}" if self.why else ""
        return f"{mean} ({self.found}{limit})"


def answers(found: list[Trained]) -> list[Answer]:
    """Of comparisons with --data recall, copy or needle."""
    return [_answer(each) for each in found]


def _answer(each: Trained) -> Answer:
    task, n, _, sequences = parse(each.data)
    most = ceiling(read_config(each.runs[0].path), draw(task, n, sequences, stream=1))
    mean = each.accuracy
    if most.accuracy >= SOLVED:
        said = "solved" if mean.value >= SOLVED else "not solved"
    else:
        # Answers to one sequence hang together: the sequence is the unit.
        error = math.sqrt(most.accuracy * (1 - most.accuracy) / sequences)
        kept = mean.value <= most.accuracy + 3 * error
        said = "as predicted" if kept else "above its ceiling"
    return Answer(
        *(task, each.key[1], n, len(each.runs), mean.value, mean.half),
        *(most.accuracy, most.why, said),
    )


def write_tasks(out: Path, found: list[Answer]) -> list[Path]:
    """tasks.csv, and tasks.md with a table for each task."""
    paths = [folder(out) / f"tasks.{kind}" for kind in ("csv", "md")]
    lines = [asdict(answer) for answer in found]
    write_csv(paths[0], list(lines[0]), lines)
    tasks = dict.fromkeys(answer.task for answer in found)
    parts = [_table(task, [a for a in found if a.task == task]) for task in tasks]
    write_text(paths[1], "\n\n".join(parts) + "\n")
    return paths


def _table(task: str, found: list[Answer]) -> str:
    lengths = sorted({answer.tokens for answer in found})
    by = {(answer.attention, answer.tokens): answer.cell for answer in found}
    names = dict.fromkeys(answer.attention for answer in found)
    cells = [[title(name), *(by.get((name, n), "–") for n in lengths)] for name in names]
    heading = f"`{task}`: right answers in per cent; chance is 6.2"
    return f"{heading}\n\n{markdown_lines(['Attention', *(f'N {n}' for n in lengths)], cells)}"
