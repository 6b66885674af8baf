"""Markdown as HTML for report.html: tables that can be linked to row by row, verdicts in colour."""

from __future__ import annotations

import re

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.token import Token

from ..compare.verdicts import kind

NAMED = "Attention"  # the column by which a row is linked to


def slug(text: str) -> str:
    """What may stand in an address: "DeepSeek MLA" -> "deepseek-mla"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def row_id(section: str, name: str) -> str:
    """Of the row of a mechanism in the first table of a section."""
    return f"{slug(section)}-{slug(name)}"


class Html:
    """Renders the sections of one page; no id stands twice, and HTML within the text is escaped."""

    def __init__(self) -> None:
        self._md = MarkdownIt("commonmark", {"html": False}).enable("table")
        before = '<div class="table"><div class="scroll"><table>'
        rules = {"table_open": lambda *_: before, "table_close": lambda *_: "</table></div></div>"}
        rules["code_inline"] = lambda tokens, i, *_: _code(tokens[i].content)
        self._md.renderer.rules |= rules
        self._taken: set[str] = set()

    def __call__(self, text: str, section: str = "") -> str:
        tokens = self._md.parse(text)
        heads: list[str] = []
        for i, token in enumerate(tokens):
            if token.type == "thead_open":
                heads = []
            elif token.type == "th_open":
                heads.append(tokens[i + 1].content)
            elif token.type == "tr_open" and heads:
                self._row(token, _cells(tokens[i:]), heads, section)
        return self._md.renderer.render(tokens, self._md.options, {})

    def inline(self, text: str) -> str:
        return self._md.renderInline(text)

    def _row(self, row: Token, cells: list[tuple[Token, str]], heads: list[str], section: str):
        """Its id, and the colour of its verdicts."""
        for head, (cell, text) in zip(heads, cells, strict=True):
            if head == NAMED and section:
                place = row_id(section, text)
                if place not in self._taken:
                    row.attrSet("id", place)
                    self._taken.add(place)
            if head.startswith("Verdict") and kind(text):
                cell.attrSet("class", f"verdict {kind(text)}")


def _code(text: str) -> str:
    """A browser would break a command within its options, behind a hyphen of `--seeds`."""
    words = (
        f'<span class="option">{escapeHtml(word)}</span>'
        if word.startswith("-")
        else escapeHtml(word)
        for word in text.split(" ")
    )
    return f"<code>{' '.join(words)}</code>"


def _cells(tokens: list[Token]) -> list[tuple[Token, str]]:
    """Of the row that these begin with, each with its text."""
    end = next(i for i, token in enumerate(tokens) if token.type == "tr_close")
    return [
        (tokens[i], "".join(part.content for part in tokens[i + 1].children or []))
        for i in range(end)
        if tokens[i].type == "td_open"
    ]
