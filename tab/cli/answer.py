"""How a command that ends in a table answers: --quiet and --json, and the tables themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import typer
from rich import box
from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .terminal import console, results


class Answer:
    """Of one command: `show` prints a table, `end` the JSON where --json asks for it.

    quiet: what is told on the way is left out. as_json: standard output holds one JSON object and
    nothing else, and all that is read by people goes to standard error.
    """

    def __init__(self, *, quiet: bool, as_json: bool):
        self.as_json = as_json
        console.stderr = results.stderr = as_json
        console.quiet, results.quiet = quiet, quiet and as_json

    def show(self, *what: RenderableType) -> None:
        for each in what:
            results.print(each)

    def text(self, text: str) -> None:
        """As it is: a terminal folds what is too long, and no line is broken."""
        results.print(text.rstrip("\n"), soft_wrap=True)

    def end(self, **content: object) -> None:
        if self.as_json:
            typer.echo(json.dumps(portable(content), indent=1, ensure_ascii=False))


def portable(value: object) -> object:
    """What JSON can hold: a path as text, and null for what is no number."""
    if isinstance(value, Mapping):
        return {_key(key): portable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [portable(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.item() if hasattr(value, "item") else value


def _key(key: object) -> str:
    return "-".join(map(str, key)) if isinstance(key, tuple) else str(key)


class Titled(Table):
    """A table with its title above and notes below, which may be wider than it is."""

    heading, note = "", ""

    def __rich_console__(self, console, options):
        yield Text(self.heading, "bold")
        for column, width in zip(self.columns, self._widths(options.max_width), strict=True):
            column.width = width
        yield from super().__rich_console__(console, options)
        if self.note:
            yield Text(self.note, "dim")
        yield Text("")

    def _widths(self, room: int) -> list[int]:
        """Of the columns, which rich would let run over the edge, where what is at the right is cut
        off. The widest gives way first, down to its longest word. Where that is not enough words
        are broken, and last of all names, which stand at the left."""
        widths, least = [], []
        for i, column in enumerate(self.columns):
            texts = [str(cell) for cell in (column.header, *column.cells)]
            parts = [part for text in texts for part in (text.split() if i else [text])]
            widths.append(max((cell_len(line) for t in texts for line in t.split("\n")), default=0))
            least.append(min(max(map(cell_len, parts), default=0), 24))
        room -= 2 * len(widths) - 1  # what rich puts between and behind them
        for least_ones in (least, [*least[:1], *[3] * (len(least) - 1)], [1] * len(least)):
            while sum(widths) > room:
                over = [i for i, width in enumerate(widths) if width > least_ones[i]]
                if not over:
                    break
                widths[max(over, key=widths.__getitem__)] -= 1
        return widths


def table(title: str, *heads: str, right: Sequence[str] = (), note: str = "") -> Titled:
    """An empty table for 80 columns and fewer: where it is narrower than its cells these are folded
    and never cut. right: the heads whose columns are set right. note: stands below, dim."""
    look = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0)}
    made = Titled(**look, pad_edge=False)
    made.heading, made.note = title, note
    for head in heads:
        made.add_column(head, justify="right" if head in right else "left", overflow="fold")
    return made


def pairs(title: str, rows: Sequence[tuple[str, object]]) -> Titled:
    """A table of names and values."""
    made = table(title, "", "")
    made.show_header = False
    for key, value in rows:
        made.add_row(key, "–" if value is None else str(value))
    return made
