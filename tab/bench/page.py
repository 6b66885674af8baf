"""A result as one HTML file that needs nothing else: what was run, and a table that sorts."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ..drawing.page import CHARTS, document
from ..files import folder, write_text
from . import history
from .charts import charts
from .history import Line
from .rows import DIRECTIONS, Row, percentiles

NOTES = {
    "bars": "A bar says how many times as fast as the fastest rival a contestant is, in the same "
    "rounds: the median, and as a line the 10th to the 90th percentile. TAB's are blue, all others "
    "orange.",
    "curves": "Memory: behind a name stands the exponent of N by which its peak grows.",
    "decoding": "A step is one token of each sequence; tokens a second are those of all of them.",
}
HISTORY_NOTE = """
    Each time is taken over that of a fixed PyTorch operation in the same round, so that a busier
    machine is no slower commit; a point is the median over processes, and the range of the line
    that is pointed at reaches from the least to the largest.
"""


def write_page(path: Path, record: dict, rows: list[Row]) -> None:
    """record: what results.save wrote. Replaces `path` whole."""
    folder(path.parent)
    drawn = charts(rows)
    parts = [
        f"<h1>{escape(_subject(rows))}</h1><p>{told(record, rows)}</p>",
        figures(drawn, 0),
        f'<div class="table"><div class="scroll">{table(rows)}</div></div>',
    ]
    scripts = ("tables.js", *(CHARTS if drawn else ()))
    data = {"looks": {}, "charts": drawn} if drawn else None
    write_text(path, document("tab bench", "\n".join(parts), scripts, data))


def write_history(path: Path, lines: list[Line]) -> None:
    """What `history` found, as a page with a chart for each direction."""
    folder(path.parent)
    drawn = history.charts(lines)
    figures_ = _figures(drawn, 0)
    heading = "Benchmark over commits"
    legend = '<div class="show"></div>'
    note = f'<p class="note">{escape(" ".join(HISTORY_NOTE.split()))}</p>'
    body = f"<h1>{heading}</h1>{legend}{figures_}{note}"
    data = {"looks": history.looks(lines), "charts": drawn}
    write_text(path, document(heading, body, CHARTS, data))


def _subject(rows: list[Row]) -> str:
    """What was measured: "Benchmark of linear, local"."""
    return f"Benchmark of {', '.join(dict.fromkeys(row.case.split('/')[0] for row in rows))}"


def figures(drawn: list[dict], first: int) -> str:
    """HTML of these charts, which are data's from `first` on, and how their bars read."""
    return f'{_figures(drawn, first)}<p class="note">{_note(drawn)}</p>' if drawn else ""


def _note(drawn: list[dict]) -> str:
    kinds = dict.fromkeys(chart.get("note", chart["kind"]) for chart in drawn)
    return " ".join(NOTES[kind] for kind in kinds)


def _figures(drawn: list[dict], first: int) -> str:
    made = (
        f'<figure data-chart="{i}"><figcaption>{escape(chart["title"])}</figcaption></figure>'
        for i, chart in enumerate(drawn, first)
    )
    return f'<div class="charts">{"".join(made)}</div>'


def told(record: dict, rows: list[Row]) -> str:
    """HTML: the command, the machine, and how the table of these rows reads."""
    facts = [*record["environment"].items(), *(record["roofline"] or {}).items()]
    if load := record.get("load"):
        facts.append(("load average", f"{load['start']:g} before, up to {load['most']:g}"))
    main = _main(_directions(rows))
    reading = (
        "<br>Median and, in brackets, 10th and 90th percentile. Rates and “tab is ×” (how many "
        f"times faster) belong to {escape(main)}."
    ) if main else ""  # fmt: skip
    return (
        f"<code>{escape(record['command'])}</code><br><small>"
        + ", ".join(f"{escape(k)} {escape(_plain(v))}" for k, v in facts)
        + f"{reading}</small>"
    )


def table(rows: list[Row]) -> str:
    """HTML of one table, less the columns that are empty; data-v holds what a column sorts by."""
    directions = _directions(rows)
    heads = ["case", "contestant", *(f"{d} ms" for d in directions), "tab is ×"]
    heads += [f"{_counted(rows)}/s", "GFLOP/s", "GB/s", "% of floor", "peak MB", "cache MB"]
    heads += ["error", "gradient error", ""]
    base = {row.case: row for row in rows if row.contestant == "tab" and row.seconds}
    lines = [_line(row, directions, base.get(row.case)) for row in rows]
    empty = ("<td></td>", "<td class=why></td>")
    kept = [i for i in range(len(heads)) if any(cells[i] not in empty for cells in lines)]
    head = "".join(f"<th>{escape(heads[i])}</th>" for i in kept)
    body = "\n".join(
        f"<tr{' class=tab' * (row.contestant.split()[0] == 'tab')}>"
        f"{''.join(cells[i] for i in kept)}</tr>"
        for row, cells in zip(rows, lines, strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def _counted(rows: list[Row]) -> str:
    """What `batch` is a number of."""
    return "tokens" if any(row.held_bytes for row in rows) else "images"


def _directions(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(d for row in rows for d in row.seconds))


def _main(directions: list[str]) -> str | None:
    """The direction that rates are given for, as in the terminal."""
    return next((d for d in (*DIRECTIONS, *directions) if d in directions), None)


def _line(row: Row, directions: list[str], base: Row | None) -> list[str]:
    cells = [_cell(row.case, row.case), _cell(row.contestant, row.contestant)]
    for d in directions:
        times = row.seconds.get(d)
        low, mid, high = (1e3 * x for x in percentiles(times)) if times else (None,) * 3
        spread = f"{mid:.3g} <small>({low:.3g}–{high:.3g})</small>" if times else ""
        cells.append(_cell(mid, spread))
    main = _main(directions)
    median = percentiles(row.seconds[main])[1] if row.seconds.get(main) else None

    def rate(amount: float | None, unit: float = 1.0) -> float | None:
        return None if median is None or amount is None else amount / median / unit

    ratio = None
    if median is not None and base is not None and base is not row and main in base.seconds:
        ratio = median / percentiles(base.seconds[main])[1]
    floor = rate(row.floor.get(main), 0.01)
    numbers = [ratio, rate(row.batch), rate(row.flops.get(main), 1e9)]
    numbers += [rate(row.moved.get(main), 1e9), floor]
    numbers += [None if x is None else x / 1e6 for x in (row.peak_bytes, row.held_bytes)]
    cells += [_cell(x, "" if x is None else _short(x)) for x in numbers]
    cells += [_cell(x, "" if x is None else f"{x:.0e}") for x in (row.error, row.gradient_error)]
    return [*cells, f"<td class=why>{escape(row.skipped or '')}</td>"]


def _cell(value: float | str | None, shown: str) -> str:
    data = "" if value is None else f' data-v="{escape(str(value), quote=True)}"'
    return f"<td{data}>{shown if value is None or isinstance(value, float) else escape(shown)}</td>"


def _short(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def _plain(x: object) -> str:
    return f"{x:.3g}" if isinstance(x, float) else str(x)
