"""Pages that need nothing but themselves: style and scripts stand inside the file."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files

# What draws the charts of a page, in this order; tables.js needs none of them.
CHARTS = ("draw.js", "forest.js", "curves.js", "tradeoff.js", "bars.js", "page.js")


def document(
    title: str, body: str, scripts: tuple[str, ...], data: object = None, contents: str = ""
) -> str:
    """body: HTML, escaped already. data: what a script reads from #data, as JSON. contents: HTML
    that stands at the left."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title><style>{asset('page.css')}</style></head>",
        f"<body>{contents}<main>{body}</main>",
    ]
    if data is not None:
        parts.append(f'<script type="application/json" id="data">{_json(data)}</script>')
    parts += [f"<script>{asset(name)}</script>" for name in scripts]
    return "\n".join([*parts, "</body></html>", ""])


def asset(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _json(data: object) -> str:
    # Nothing in it may end the script element.
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
