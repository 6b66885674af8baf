"""Rows of a table, as data and to look at."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.table import Table

from ..cli.terminal import plain

WIDTH = 120  # of the text, in characters


class Rows(list[dict[str, Any]]):
    """A list of dicts with the same keys that shows itself as a table: in Python's shell, in a
    notebook and with rich. shown: the keys that are, and their heads; by default all. percent: keys
    of shares of 1 that are shown times 100. starred: a key -> the one that says whether its value
    has a star.

    >>> from tab.api.rows import Rows
    >>> Rows([{"attention": "linear", "test": 0.5, "note": None}])
     attention   test   note
     ───────────────────────
     linear       0.5   –
    """

    def __init__(
        self,
        rows: Iterable[dict[str, Any]] = (),
        shown: Mapping[str, str] | None = None,
        percent: Iterable[str] = (),
        starred: Mapping[str, str] | None = None,
    ):
        super().__init__(rows)
        keys = self[0] if self else ()
        self.shown, self.percent = dict(shown or zip(keys, keys, strict=True)), set(percent)
        self.starred = starred or {}

    def cells(self) -> list[list[str]]:
        """As they are shown, a list a line."""
        return [[self._cell(row, key) for key in self.shown] for row in self]

    def _cell(self, row: dict[str, Any], key: str) -> str:
        value = row[key]
        if value is None or value == "":
            return "–"
        if key in self.percent:
            return f"{100 * value:.2f}"
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        return text + " *" * bool(key in self.starred and row[self.starred[key]])

    def __rich__(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        for key, head in self.shown.items():
            numbers = any(isinstance(row[key], int | float) for row in self)
            table.add_column(head, justify="right" if numbers else "left", overflow="fold")
        for line in self.cells():
            table.add_row(*line)
        return table

    def __repr__(self) -> str:
        console = plain(file=io.StringIO(), width=WIDTH)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def _repr_html_(self) -> str:
        def line(tag: str, texts: Iterable[str]) -> str:
            return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)

        body = "".join(f"<tr>{line('td', cells)}</tr>" for cells in self.cells())
        head = line("th", self.shown.values())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
