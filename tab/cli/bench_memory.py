"""`tab bench memory`: how the peak memory of an op grows with the number of tokens."""

from __future__ import annotations

import itertools
from typing import Annotated

import typer

from ..machine import command as begun
from . import options
from .answer import Answer
from .bench_options import Ops, Out, chosen
from .given import use_threads
from .terminal import bar, say


def command(
    ops: Ops = "all",
    longest: Annotated[int, typer.Option(metavar="N", help="Largest number of tokens.")] = 16384,
    threads: options.Threads = None,
    out: Out = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Measure how the peak memory of each op on the CPU grows with the number of tokens."""
    answer = Answer(quiet=quiet, as_json=as_json)
    use_threads(threads)
    from ..bench.page import write_page
    from ..bench.peak_memory import LENGTHS, entrants, memory, picture
    from ..bench.registry import names
    from ..bench.results import environment, save
    from .bench_tables import memory_table, summaries

    facts, rows = environment("cpu"), []
    if longest < LENGTHS[1]:
        raise ValueError(
            f"--longest {longest}: growth needs two lengths; give at least {LENGTHS[1]}"
        )
    wanted, lengths = chosen(ops, names(), "--ops"), tuple(n for n in LENGTHS if n <= longest)
    total, tables = len(lengths) * sum(len(entrants(op)) for op in wanted), []
    with bar("memory") as show:
        for op in wanted:
            points = itertools.count(len(rows))

            def point(what: str, points=points) -> None:
                show(next(points), total, what)

            new = memory(op, lengths, progress=point)
            rows += new
            tables.append(memory_table(new))
            if out:
                write_page(out.with_suffix(".html"), save(out, rows, None, facts, begun()), rows)
    answer.show(*tables)
    if out:
        picture(rows, out.with_suffix(".png"))
        say(f"Page: {out.with_suffix('.html')}")
    answer.end(out=out, rows=summaries(rows), next=None, environment=facts)
