"""Names, paths and errors as they are shown; in Markdown whatever stands in them is read as it is
written."""

from __future__ import annotations

import re

from ..layers import known_layer
from ..statistics import LEVEL

PERCENT = f"{100 * LEVEL:g} %"  # of intervals

# What CommonMark, GitHub's tables and its mathematics would take for markup. "<" and "&" where they
# begin a tag or a character, "_" where it is not within a word.
_MARKUP = re.compile(r"[\\`*\[\]|$~]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<!\w)_|_(?!\w)")


def title(attention: str) -> str:
    """The name to read: the layer's title; a layer without one, or that is not installed here,
    keeps the name that it was trained under."""
    layer = known_layer(attention)
    return (layer and layer.title) or attention


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
