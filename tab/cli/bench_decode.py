"""`tab bench decode`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from ..machine import command as as_typed
from . import options
from .answer import Answer
from .bench_options import Budget, Contestants, On, Out, Processes, beginnings, chosen, warn
from .given import before_work, use_threads
from .terminal import bar, say

DTYPES = ("float32", "bfloat16", "float16")


def command(
    lengths: Annotated[
        str, typer.Option(metavar="A,B", help="Numbers of tokens before, separated by commas.")
    ] = "1024,4096,16384",
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Number of sequences.")] = 4,
    heads: Annotated[int, typer.Option(min=1, metavar="N", help="Number of heads of q.")] = 8,
    kv_heads: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Number of heads of k and v; by default as many as of q."
        ),
    ] = None,
    width: Annotated[
        int, typer.Option(min=2, metavar="N", help="Width D of a head, an even number.")
    ] = 64,
    window: Annotated[
        int,
        typer.Option(
            min=128,
            metavar="N",
            help="Tokens that local, sparse and H2O keep, a multiple of 64.",
        ),
    ] = 256,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Type of the inputs: float32, bfloat16 or float16.")
    ] = "float32",
    device: On = "cpu",
    contestants: Contestants = "all",
    budget: Budget = 3.0,
    processes: Processes = 5,
    threads: options.Threads = None,
    out: Out = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Time decoding, a token at a time, from each mechanism's cache, beside SDPA and plain PyTorch.

    Contestants are named by the beginnings of their names: tab for all of TAB's, tab linear,
    sdpa, recurrent, eager."""
    answer = Answer(quiet=quiet, as_json=as_json)
    before_work(trains=False)
    use_threads(threads)
    import torch

    from ..bench.decode import measure
    from ..bench.decode_chart import picture
    from ..bench.decoders import BLOCK, Setting, names
    from ..bench.page import write_page
    from ..bench.results import environment, save
    from ..bench.turns import Load, in_turns
    from .bench_tables import decode_table, grouped, summaries

    kv = heads if kv_heads is None else kv_heads
    if heads % kv or width % 2 or window % BLOCK:
        raise ValueError(
            f"--kv-heads divides --heads, --width is even and --window a multiple of {BLOCK}; got "
            f"{kv}, {heads}, {width} and {window}"
        )
    prefixes = beginnings(contestants)
    if prefixes and not any(name.startswith(prefixes) for name in names()):
        raise ValueError(f"--contestants {contestants}: choose from {', '.join(names())}")
    kind = getattr(torch, chosen(dtype, DTYPES, "--dtype")[0])
    units = [Setting(n, batch, heads, kv, width, window, kind, device) for n in _numbers(lengths)]
    one = partial(
        measure,
        budget=budget / processes,
        min_rounds=5 if processes == 1 else 3,
        only=partial(_entered, prefixes),
    )
    facts, load, found = environment(device), Load(), {}
    total = processes * len(units)
    say(f"Turns: {total} (cases: {len(units)}, processes: {processes})")
    with bar("decode") as show:
        show(0, total, units[0].name)
        for done, (i, group) in enumerate(in_turns(units, one, processes), 1):
            found[i] = group
            rows = [row for mine in found.values() for row in mine]
            load.note()
            show(done, total, units[done % len(units)].name)
            if out:  # each time, so that what was measured is kept
                record = save(out, rows, None, facts, as_typed(), load.record())
    answer.show(*(decode_table(case, mine) for case, mine in grouped(rows).items()))
    warn(load)
    if out:
        picture(rows, out.with_suffix(".png"))
        write_page(out.with_suffix(".html"), record, rows)
        say(f"Page: {out.with_suffix('.html')}")
    answer.end(out=out, results=summaries(rows), load=load.record(), environment=facts)


def _numbers(lengths: str) -> list[int]:
    numbers = [int(n) if n.isdigit() else 0 for n in lengths.split(",")]
    if min(numbers) < 16:
        raise ValueError(
            f"--lengths {lengths}: give numbers of tokens, 16 at least, separated by commas"
        )
    return numbers


def _entered(prefixes: tuple[str, ...] | None, name: str) -> bool:
    return prefixes is None or name.startswith(prefixes)
