"""`tab bench growth`: what an op takes against the number of tokens."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from ..machine import command as as_typed
from . import options
from .answer import Answer
from .bench_options import Budget, Contestants, Ops, Out, beginnings, chosen, entered, warn
from .given import before_work, use_threads
from .terminal import bar


def command(
    ops: Ops = "all",
    longest: Annotated[int, typer.Option(metavar="N", help="Largest number of tokens.")] = 65536,
    limit: Annotated[
        float,
        typer.Option(
            metavar="X", callback=options.within(0), help="Seconds that a call of a rival may take."
        ),
    ] = 5.0,
    contestants: Contestants = "all",
    budget: Budget = 3.0,
    threads: options.Threads = None,
    out: Out = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Measure how the time of each op on the CPU grows with the number of tokens, beside rivals."""
    answer = Answer(quiet=quiet, as_json=as_json)
    before_work(trains=False)
    use_threads(threads)
    import torch

    from ..bench.growth import DIRECTIONS, LENGTHS, curves, milliseconds, picture
    from ..bench.page import write_page
    from ..bench.registry import names
    from ..bench.results import environment, save
    from ..bench.roofline import measure_roofline
    from ..bench.turns import Load
    from .bench_tables import WORDS, growth_table, summaries

    if longest < LENGTHS[1]:
        raise ValueError(
            f"--longest {longest}: growth needs two lengths; give at least {LENGTHS[1]}"
        )
    wanted, lengths = chosen(ops, names(), "--ops"), [n for n in LENGTHS if n <= longest]
    facts, roofline = environment("cpu"), measure_roofline(torch.float32, "cpu")
    only = partial(entered, beginnings(contestants))
    load, rows, tables = Load(), [], []
    with bar("growth") as show:
        for i, op in enumerate(wanted):
            mine = []
            for j, some in enumerate(curves(op, lengths, roofline, limit, budget, only), 1):
                mine += some
                load.note()
                show(i * len(lengths) + j, len(wanted) * len(lengths), some[0].case)
                if out:  # each time, so that what was measured is kept
                    every = [*rows, *mine]
                    record = save(out, every, roofline, facts, as_typed(), load.record())
                    write_page(out.with_suffix(".html"), record, every)
            rows += mine
            for way in DIRECTIONS:
                title = f"{op}: ms, {WORDS[way]}"
                tables.append(growth_table(mine, title, milliseconds(way)))
    answer.show(*tables)
    warn(load)
    if out:
        picture(rows, out.with_suffix(".png"))
    answer.end(out=out, results=summaries(rows), load=load.record(), environment=facts)
