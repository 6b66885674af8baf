"""report.html: report.md's own words and tables, with charts to point at, in one file."""

from __future__ import annotations

import base64
import io
import re
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt
from PIL import Image

from ..bench import page as bench_page
from ..bench import results as bench_results
from ..compare.verdicts import is_attention
from ..web import document
from .chart_data import Group
from .tables import Standing, title

LIMIT = 5_000_000  # bytes of the page: what mail and a repository still take


def html_page(
    text: str,
    ranked: dict[str, list[Standing]],
    looks: dict,
    groups: list[Group],
    pictures: dict[Path, str],
    bench: Path | None,
    *,
    limit: int = LIMIT,
) -> str:
    """text: report.md without pictures. looks: charts.looks. pictures: file -> caption, to be
    embedded as long as the page stays below `limit`, and named where it would not. bench: a folder
    of results of `tab bench`."""
    kernels = _kernels(bench) if bench else ""
    plain = _page(text, ranked, looks, groups, "", kernels)
    room = limit - len(plain.encode())
    if room < 0:
        said = f"**This page is larger than {limit / 1e6:g} MB** even without its pictures."
        text = text.replace("\n\n", f"\n\n{said}\n\n", 1)
    return _page(text, ranked, looks, groups, _embedded(pictures, room, limit), kernels)


def _page(text, ranked, looks, groups, pictures: str, kernels: str) -> str:
    name, rest = text.removeprefix("# ").split("\n\n", 1)
    head, *sections = rest.split("\n\n## ")
    drawn = [chart for group in groups for chart in group.charts]
    # Charts whose heading is a section's stand there, the others before all sections.
    there = {group.heading: _group(group, drawn) for group in groups}
    parts = [
        f"<h1>{MarkdownIt('commonmark', {'html': False}).renderInline(name)}</h1>",
        f'<div class="answer">{"".join(f"<p>{escape(s)}</p>" for s in answers(ranked))}</div>',
        _markdown(head),
    ]
    titles = [section.split("\n\n", 1)[0] for section in sections]
    legend = '<div class="show"></div>'
    for heading, figures in there.items():
        if heading not in titles:
            parts.append(f"<section><h2>{heading}</h2>{legend}{figures}</section>")
    for heading, section in zip(titles, sections, strict=True):
        words, figures = _markdown(section.removeprefix(heading)), there.get(heading, "")
        parts.append(f"<section>{_markdown(f'## {heading}')}{figures}{words}</section>")
    scripts = ("tables.js", *(["charts.js"] if drawn else []))
    data = {"looks": looks, "charts": drawn} if drawn else None
    words = re.sub(r"\\(.)", r"\1", name)
    return document(words, "\n".join([*parts, pictures, kernels]), scripts, data)


def _group(group: Group, drawn: list[dict]) -> str:
    figures = (
        f'<figure data-chart="{drawn.index(chart)}"><figcaption>{escape(chart["title"])}'
        "</figcaption></figure>"
        for chart in group.charts
    )
    kind = "charts small" if group.small else "charts"
    return f'<div class="{kind}">{"".join(figures)}</div><p class="note">{escape(group.note)}</p>'


def answers(ranked: dict[str, list[Standing]]) -> list[str]:
    """A sentence for each model: whether the best mechanism helped, by how much, how surely."""
    return [_answer(model.upper(), entries) for model, entries in ranked.items()]


def _answer(model: str, entries: list[Standing]) -> str:
    judged = [e for e in entries if e.verdict and e.verdict.difference is not None]
    judged = [e for e in judged if is_attention(e.attention)]
    if not judged:
        return f"{model}: nothing here was compared with the control, so there is no answer."
    best = max(judged, key=lambda e: e.verdict.difference)
    found = best.verdict
    text = f"{model}: of {len(judged)} attention mechanisms {title(best.attention)} did best, "
    text += f"{_apart(found.difference)} no attention"
    if found.difference_low is None:
        return f"{text}. That is one seed, without an interval: it settles nothing."
    low, high, verdict = found.difference_low, found.difference_high, found.verdict
    text += f" (95 % interval {100 * low:+.1f} to {100 * high:+.1f}, {found.seeds} seeds)"
    if found.best_control_low is not None:
        low, high, verdict = (
            found.best_control_low,
            found.best_control_high,
            found.best_control_verdict,
        )
        text += f" and {_apart(found.best_control_difference)} the best row that is no attention"
        text += f", {title(found.best_control)} ({100 * low:+.1f} to {100 * high:+.1f})"
    meaning = {
        "better": "so attention helped",
        "worse": "so attention hurt",
        "equivalent": "which is as good as no difference",
    }
    word = verdict.split()[0].rstrip(",")
    return f"{text}, {meaning.get(word, 'which these seeds cannot tell from chance')}."


def _apart(difference: float) -> str:
    points = 100 * difference
    return f"{abs(points):.1f} points {'above' if points >= 0 else 'below'}"


def _markdown(text: str) -> str:
    """Escapes whatever HTML the text holds."""
    md = MarkdownIt("commonmark", {"html": False}).enable("table")
    opened = lambda *_: '<div class="table"><div class="scroll"><table>'  # noqa: E731
    md.renderer.rules |= {"table_open": opened, "table_close": lambda *_: "</table></div></div>"}
    return md.render(text)


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
    return "\n".join(["<h2>Pictures</h2>", *figures])


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


def _kernels(folder: Path) -> str:
    """The tables of `tab bench` that lie in a folder."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder} holds no result of `tab bench`: give the folder of its JSON")
    parts = ["<h2>Kernels</h2>"]
    for file in files:
        record, rows = bench_results.load(file)
        parts += [f"<p><b>{escape(file.stem)}</b><br>{bench_page.told(record, rows)}</p>"]
        parts += [f'<div class="table"><div class="scroll">{bench_page.table(rows)}</div></div>']
    return "\n".join(parts)
