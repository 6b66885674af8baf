"""report.html: report.md's own words and tables, with charts to point at, in one file."""

from __future__ import annotations

import base64
import io
import re
from html import escape
from pathlib import Path

from PIL import Image

from ..bench import page as bench_page
from ..bench import results as bench_results
from ..bench.charts import charts as bench_charts
from ..drawing.page import CHARTS, document
from .chart_data import Group
from .html_tables import Html, slug

ORIGIN = "What was run"
LIMIT = 5_000_000  # bytes of the page: what mail and a repository still take


def html_page(
    text: str,
    looks: dict,
    groups: list[Group],
    pictures: dict[Path, str],
    bench: Path | None,
    *,
    limit: int = LIMIT,
) -> str:
    """text: report.md without pictures. looks: charts.looks. groups: the charts; those whose
    heading is a section's stand in it, `wide` ones below the answer, the others before all
    sections. pictures: file -> caption, to be embedded as long as the page stays below `limit`, and
    named where it would not. bench: a folder of results of `tab bench`."""
    kernels, more = _kernels(bench, len(_charts(groups))) if bench else ("", [])
    groups = [*groups, Group("", "", more)] if more else groups
    plain = _page(text, looks, groups, "", kernels)
    room = limit - len(plain.encode())
    if room < 0:
        said = f"**This page is larger than {limit / 1e6:g} MB** even without its pictures."
        text = text.replace("\n\n", f"\n\n{said}\n\n", 1)
    return _page(text, looks, groups, _embedded(pictures, room, limit), kernels)


def _page(text: str, looks: dict, groups: list[Group], pictures: str, kernels: str) -> str:
    html = Html()
    name, rest = text.removeprefix("# ").split("\n\n", 1)
    head, *sections = rest.split("\n\n## ")
    answer, head = _quoted(head)
    titles = [section.split("\n\n", 1)[0] for section in sections]
    drawn = _charts(groups)
    groups = [group for group in groups if group.heading]  # those of kernels stand with them
    there = {group.heading: _group(group, drawn) for group in groups}
    first = [g.heading for g in groups if g.wide]
    before = [g.heading for g in groups if not g.wide and g.heading not in titles]
    parts = [f"<h1>{html.inline(name)}</h1>", f'<div class="answer">{html(answer)}</div>']
    parts += [_section(heading, there[heading]) for heading in first]
    parts += [_section(ORIGIN, html(head))]
    legend = '<div class="show"></div>'
    parts += [_section(heading, legend + there[heading]) for heading in before]
    for heading, section in zip(titles, sections, strict=True):
        words = html(section.removeprefix(heading), heading)
        parts.append(_section(heading, there.get(heading, "") + words))
    named = [*first, ORIGIN, *before, *titles, *(["Pictures"] if pictures else [])]
    contents = _contents([*named, *(["Kernels"] if kernels else [])])
    scripts = ("tables.js", *(CHARTS if drawn else []))
    data = {"looks": looks, "charts": drawn} if drawn else None
    words = re.sub(r"\\(.)", r"\1", name)
    return document(words, "\n".join([*parts, pictures, kernels]), scripts, data, contents)


def _charts(groups: list[Group]) -> list[dict]:
    return [chart for group in groups for chart in group.charts]


def _quoted(head: str) -> tuple[str, str]:
    """The answer, which report.md quotes at its top, and the rest."""
    quoted = [line for line in head.split("\n") if line.startswith(">")]
    rest = "\n".join(line for line in head.split("\n") if not line.startswith(">"))
    return "\n".join(line.removeprefix(">").strip() for line in quoted), rest.strip()


def _section(heading: str, html: str) -> str:
    return f'<section id="{slug(heading)}"><h2>{escape(heading)}</h2>{html}</section>'


def _contents(headings: list[str]) -> str:
    links = (f'<li><a href="#{slug(h)}">{escape(h)}</a></li>' for h in headings)
    return f'<nav aria-label="Contents"><b>Contents</b><ul>{"".join(links)}</ul></nav>'


def _group(group: Group, drawn: list[dict]) -> str:
    figures = (
        f'<figure data-chart="{drawn.index(chart)}"><figcaption>{escape(chart["title"])}'
        "</figcaption></figure>"
        for chart in group.charts
    )
    kind = "wide" if group.wide else "charts small" if group.small else "charts"
    return f'<div class="{kind}">{"".join(figures)}</div><p class="note">{escape(group.note)}</p>'


def _embedded(pictures: dict[Path, str], room: int, limit: int) -> str:
    """The small ones first, until `room` bytes are used; a line in place of each of the others."""
    if not pictures:
        return ""
    data = {path: base64.b64encode(_webp(path)).decode() for path in pictures}
    for path in sorted(data, key=lambda path: len(data[path])):
        room -= len(data[path]) + 1000  # with what stands around it
        if room < 0:
            data[path] = ""
    figures = (_picture(p, caption, data[p], limit) for p, caption in pictures.items())
    return _section("Pictures", "\n".join(figures))


def _picture(path: Path, caption: str, data: str, limit: int) -> str:
    caption = escape(caption, quote=True)
    if not data:
        where = escape(f"{path.parent.name}/{path.name}")
        return (
            f"<p><b>{caption}</b>: left out here, so that this page stays below "
            f"{limit / 1e6:g} MB; it lies in <code>{where}</code>.</p>"
        )
    return (
        f'<figure class="picture"><img alt="{caption}" src="data:image/webp;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _webp(path: Path) -> bytes:
    """A third of the PNG's size, which is that of noise for filters."""
    into = io.BytesIO()
    Image.open(path).convert("RGB").save(into, "WEBP", quality=85, method=4)
    return into.getvalue()


def _kernels(folder: Path, first: int) -> tuple[str, list[dict]]:
    """What of `tab bench` lies in a folder: HTML, and its charts, which are data's from `first`."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder} holds no result of `tab bench`: give the folder of its JSON")
    parts, drawn = [], []
    for file in files:
        record, rows = bench_results.load(file)
        mine = bench_charts(rows)
        parts += [f"<p><b>{escape(file.stem)}</b><br>{bench_page.told(record, rows)}</p>"]
        parts += [bench_page.figures(mine, first + len(drawn))]
        parts += [f'<div class="table"><div class="scroll">{bench_page.table(rows)}</div></div>']
        drawn += mine
    return _section("Kernels", "\n".join(parts)), drawn
