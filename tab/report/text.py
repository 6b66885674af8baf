"""Names, paths and errors in Markdown: whatever stands in them is read as it is written."""

from __future__ import annotations

import re

# What CommonMark, GitHub's tables and its mathematics would take for markup. "<" and "&" where they
# begin a tag or a character, "_" where it is not within a word.
_MARKUP = re.compile(r"[\\`*\[\]|$~]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<!\w)_|_(?!\w)")


def plain(text: object) -> str:
    """Text as text, on one line."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(str(text).split()))


def counted(n: int, what: str) -> str:
    """'1 seed', '3 seeds'"""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def code(text: object) -> str:
    """The same as a span of code, outside tables."""
    text = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    room = " " if len(fence) > 1 else ""
    return f"{fence}{room}{text}{room}{fence}"
