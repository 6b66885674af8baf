"""A result as one HTML file that needs nothing else: what was run, and a table that sorts."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ..files import write_text
from ..web import asset
from .rows import DIRECTIONS, Row, percentiles

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem;
       color: #1b1b1b; background: #fff }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
th { cursor: pointer; position: sticky; top: 0; background: #fff; white-space: nowrap }
th:hover { color: #0072b2 }
td:nth-child(-n+2), th:nth-child(-n+2), td.why { text-align: left }
tr.tab td:nth-child(2) { color: #0072b2; font-weight: 600 }
small, td.why { color: #666 }
@media (prefers-color-scheme: dark) { body, th { color: #ddd; background: #191919 }
  th, td { border-color: #444 } tr.tab td:nth-child(2) { color: #6cb8ee } }
"""


def write_page(path: Path, record: dict, rows: list[Row]) -> None:
    """record: what results.save wrote. Replaces `path` whole."""
    lines = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width"><title>tab bench</title>',
        f"<style>{_STYLE}</style><h1>tab bench</h1>",
        f"<p>{told(record, rows)}",
        "<p><small>A click on a head sorts.</small>",
        f"{table(rows)}<script>{asset('tables.js')}</script>",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")


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
    heads += ["images/s", "GFLOP/s", "GB/s", "% of floor", "peak MB", "error", "gradient error", ""]
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
    numbers += [None if row.peak_bytes is None else row.peak_bytes / 1e6]
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
