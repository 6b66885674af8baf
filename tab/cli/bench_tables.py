"""The tables of `tab bench` for the terminal; the pages and pictures of --out hold the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.table import Table
from rich.text import Text

from ..bench.growth import Value, exponent
from ..bench.history import Line
from ..bench.peak_memory import growth, tokens
from ..bench.regress import Change
from ..bench.rows import DIRECTIONS, Row, percentiles, row_speedup
from .answer import Titled, table

WORDS = {"forward": "forward", "backward": "backward", "both": "forward + backward"}


def op_tables(rows: list[Row]) -> Iterator[Table]:
    """One for each case and direction: milliseconds, and how many times as fast as it TAB is."""
    for case, group in grouped(rows).items():
        directions = [d for d in DIRECTIONS if any(d in row.seconds for row in group)]
        for direction in directions:
            yield _op_table(case, group, direction, last=direction == directions[-1])


def grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """By case."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case, []).append(row)
    return groups


def _op_table(case: str, rows: list[Row], direction: str, *, last: bool) -> Table:
    heads = ("Contestant", "ms", "TAB is ×", "% of floor", "Error", *["Peak MB"] * last)
    absent = [f"{row.contestant}: {row.skipped}" for row in rows if row.skipped]
    note = "\n".join(absent) if last else ""
    made = table(f"{case}, {WORDS[direction]}", *heads, right=heads[1:], note=note)
    for row in rows:
        if direction not in row.seconds:
            continue
        seconds = percentiles(row.seconds[direction])
        made.add_row(
            row.contestant,
            spread([1e3 * x for x in seconds], ".2f"),
            _speedup(row, rows[0], direction),
            f"{100 * row.floor[direction] / seconds[1]:.0f}",
            _error(row.error if direction == "forward" else row.gradient_error),
            *["–" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"] * last,
        )
    return made


def spread(of: Iterable[float], form: str) -> str:
    """p50 (p10–p90)"""
    low, mid, high = of
    return f"{mid:{form}} ({low:{form}}–{high:{form}})"


def _speedup(row: Row, base: Row, direction: str) -> str:
    if row is base or direction not in base.seconds:
        return ""
    return spread(row_speedup(row, base, direction), ".2f")


def _error(x: float | None) -> str:
    return "–" if x is None else f"{x:.0e}"


def steps_table(rows: list[Row]) -> Table:
    """A model's training steps: images/s, and ratios of steps in the same round."""
    memory = any(row.peak_bytes for row in rows)
    timed = {row.contestant: row for row in rows}
    ceiling = any(name.startswith("free ") for name in timed)
    heads = ("Attention", "Images/s", "× control", "TAB is × eager", *["Ceiling"] * ceiling)
    heads += ("Peak MB",) * memory
    made = table(rows[0].case, *heads, right=heads[1:], note=_steps_note(rows))
    for row in rows:
        if row.skipped:
            continue
        low, mid, high = percentiles(row.seconds["step"])
        made.add_row(
            row.contestant,
            spread([row.batch / x for x in (high, mid, low)], ",.0f"),
            "" if row.contestant == "none" else _speedup_of(row, timed["none"]),
            _eager(row, timed),
            *[_eager(row, timed, "free ")] * ceiling,
            *["–" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}"] * memory,
        )
    return made


def _speedup_of(row: Row, other: Row) -> str:
    return spread(row_speedup(row, other, "step"), ".2f")


def _eager(row: Row, timed: dict[str, Row], fast: str = "tab ") -> str:
    """How many times as fast as the eager twin: of the row of TAB that it is, or its free twin."""
    name = row.contestant.removeprefix("tab ")
    eager, fast_row = timed.get(f"eager {name}"), timed.get(fast + name)
    if row.contestant == name or eager is None or eager.skipped or fast_row is None:
        return ""
    return _speedup_of(eager, fast_row)


def _steps_note(rows: list[Row]) -> str:
    lines = ["Median (10th–90th percentile). × control: time of a step over the control's."]
    if any(row.contestant.startswith("free ") for row in rows):
        lines.append("Ceiling: how many times as fast as eager a step is if attention is free.")
    return "\n".join(lines + [f"{row.contestant}: {row.skipped}" for row in rows if row.skipped])


def memory_table(rows: list[Row]) -> Table:
    """Peak MB of one op for each N, and the exponent of its growth."""
    lengths = sorted({tokens(row) for row in rows})
    heads = ("Contestant", *(f"N {n}" for n in lengths), "Grows as")
    notes = [f"{r.contestant} at {r.case}: {r.skipped}" for r in rows if r.skipped]
    op = rows[0].case.split("/")[0]
    made = table(
        f"{op}: peak MB, forward + backward", *heads, right=heads[1:], note="\n".join(notes)
    )
    for name in dict.fromkeys(row.contestant for row in rows):
        mine = {tokens(row): row for row in rows if row.contestant == name}
        cells = [
            "–" if r.skipped else f"{r.peak_bytes / 1e6:,.1f}" for _, r in sorted(mine.items())
        ]
        exponent = growth(list(mine.values()))
        made.add_row(name, *cells, "–" if exponent is None else f"N^{exponent:.2f}")
    return made


def growth_table(rows: list[Row], title: str, value: Value) -> Table:
    """One op's value for each contestant and N, and the exponent of its growth."""
    lengths = sorted({tokens(row) for row in rows})
    heads = ("Contestant", *(f"N {n}" for n in lengths), "Grows as")
    first = {row.contestant: row for row in reversed(rows) if row.skipped}
    notes = [f"{name} from N {tokens(row)} on: {row.skipped}" for name, row in first.items()]
    made = table(title, *heads, right=heads[1:], note="\n".join(notes))
    for name in dict.fromkeys(row.contestant for row in rows):
        mine = [row for row in rows if row.contestant == name]
        known = {tokens(row): value(row) for row in mine}
        cells = [f"{known[n]:,.3g}" if known.get(n) else "–" for n in lengths]
        e = exponent(mine, value)
        made.add_row(name, *cells, "–" if e is None else f"N^{e:.2f}")
    return made


def decode_table(case: str, rows: list[Row]) -> Table:
    """What a step of decoding takes, the tokens of all sequences in a second, and the cache."""
    heads = ("Contestant", "ms a step", "Tokens/s", "Cache MB", "Error")
    notes = [f"{row.contestant}: {row.skipped}" for row in rows if row.skipped]
    made = table(case, *heads, right=heads[1:], note="\n".join(notes))
    for row in rows:
        if row.skipped:
            continue
        low, mid, high = percentiles(row.seconds["forward"])
        made.add_row(
            row.contestant,
            spread([1e3 * x for x in (low, mid, high)], ".3g"),
            f"{row.batch / mid:,.0f}",
            f"{row.held_bytes / 1e6:,.3g}",
            _error(row.error),
        )
    return made


def changes_tables(changes: list[Change]) -> Iterator[Table]:
    """What changed between two results: one for each case, a line for each contestant and
    direction."""
    cases = list(dict.fromkeys(c.case for c in changes))
    for case in cases:
        made = _changes([c for c in changes if c.case == case])
        made.heading = case
        if case == cases[-1]:
            made.note = "Change: of the time over the fixed op's, with the interval of --alpha."
        yield made


def _changes(changes: list[Change]) -> Titled:
    made = table("", "Contestant", "ms", "Change", "Verdict", right=("ms",))
    for c in changes:
        bad = c.bad or c.undecidable
        colour = "red" if bad else "green" if c.verdict == "faster" else "dim"
        old, new = ("–" if x is None else f"{1e3 * x:.3g}" for x in (c.old, c.new))
        change = "–" if c.ratio is None else f"{100 * (c.ratio - 1):+z.1f} %"
        if c.low is not None:
            change += f" ({100 * (c.low - 1):+.3g} … {100 * (c.high - 1):+.3g})"
        what = " ".join(filter(None, (c.contestant, c.direction)))
        made.add_row(what, f"{old} → {new}", change, Text(c.verdict, style=colour))
    return made


def history_tables(lines: list[Line]) -> Iterator[Table]:
    """TAB's own times over commits: one for each case, contestant and direction."""
    note = "Times as fast as the first, each time over the fixed op's (lowest–highest process)."
    for line in lines:
        what = f"{line.case}: {line.contestant}, {line.direction}"
        last = note if line is lines[-1] else ""
        made = table(what, "Commit", "ms", "Times as fast", right=("ms",), note=last)
        for p in line.points:
            made.add_row(p.commit, f"{p.ms:.3g}", f"{p.value:.2f} ({p.low:.2f}–{p.high:.2f})")
        yield made


def summaries(rows: list[Row]) -> list[dict]:
    """For --json: what the tables are made of, in seconds, bytes and FLOPs; no single time."""
    keys = ("case", "contestant", "skipped", "error", "gradient_error", "peak_bytes", "held_bytes")
    keys += ("batch", "tokens")
    return [
        {
            **{key: getattr(row, key) for key in keys},
            "seconds": {
                d: dict(zip(("p10", "p50", "p90"), percentiles(times), strict=True))
                for d, times in row.seconds.items()
                if times
            },
            **{key: getattr(row, key) for key in ("floor", "flops", "moved")},
        }
        for row in rows
    ]
