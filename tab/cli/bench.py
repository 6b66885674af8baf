"""`tab bench` and `tab bench steps`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..machine import command
from ..study.given import use_plugins
from . import bench_compare, bench_decode, bench_growth, bench_history, bench_memory, options
from .answer import Answer
from .bench_options import (
    Budget,
    Contestants,
    On,
    Ops,
    Out,
    Processes,
    beginnings,
    chosen,
    entered,
    warn,
)
from .given import before_work, use_threads
from .terminal import bar, command_group, command_line, next_command, say

app = command_group("Measure the ops against what you could run instead.")
app.command("compare")(bench_compare.command)
app.command("decode")(bench_decode.command)
app.command("growth")(bench_growth.command)
app.command("history")(bench_history.command)
app.command("memory")(bench_memory.command)

DTYPES = ("float32", "bfloat16", "float16")


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    ops: Ops = "all",
    sizes: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="Names of sizes, separated by commas, or all: cifar, vision, long, window, "
            "bigbird, decode, tiny, and n64, n128, … n65536.",
        ),
    ] = "vision",
    causal: Annotated[
        str, typer.Option(metavar="WHICH", help="Causal attention: no, yes or both.")
    ] = "no",
    dtype: Annotated[
        str,
        typer.Option(metavar="NAME", help="Type of the inputs: float32, bfloat16 or float16."),
    ] = "float32",
    device: On = "cpu",
    directions: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="Directions to time, separated by commas: forward, backward, both (one after "
            "the other).",
        ),
    ] = "forward,both",
    contestants: Contestants = "all",
    budget: Budget = 3.0,
    cold: Annotated[bool, typer.Option(help="Empty the caches before each call.")] = False,
    processes: Processes = 5,
    threads: options.Threads = None,
    out: Out = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Check each contestant against float64, then time them in turns."""
    if context.invoked_subcommand:
        return
    answer = Answer(quiet=quiet, as_json=as_json)
    before_work(trains=False)
    use_threads(threads)
    import torch

    from ..bench.cases import SIZES
    from ..bench.charts import picture
    from ..bench.measure import measure
    from ..bench.page import write_page
    from ..bench.registry import cases, names
    from ..bench.results import environment, save
    from ..bench.roofline import measure_roofline
    from ..bench.rows import DIRECTIONS
    from ..bench.turns import Load
    from .bench_tables import op_tables, summaries

    kind = getattr(torch, chosen(dtype, DTYPES, "--dtype")[0])
    wanted = tuple(chosen(directions, DIRECTIONS, "--directions"))
    flags = {"no": (False,), "yes": (True,), "both": (False, True)}[
        chosen(causal, ("no", "yes", "both"), "--causal")[0]
    ]
    prefixes = beginnings(contestants)
    every = chosen(ops, names(), "--ops"), chosen(sizes, list(SIZES), "--sizes")
    raced = cases(*every, flags, kind, device)
    facts, roofline = environment(device), measure_roofline(kind, device)
    say(
        f"Ceilings of this run: {roofline.flops / 1e9:.0f} GFLOP/s, "
        f"{roofline.bandwidth / 1e9:.1f} GB/s"
    )
    load, found = Load(), {}
    one = partial(
        measure,
        roofline=roofline,
        directions=wanted,
        budget=budget / processes,
        min_rounds=_rounds(processes),
        cold=cold,
        only=partial(entered, prefixes),
    )
    for i, group in _turns(raced, one, processes):
        found[i] = group
        rows = [row for mine in found.values() for row in mine]
        load.note()
        if out:  # each time, so that what was measured is kept
            record = save(out, rows, roofline, facts, command(), load.record())
    answer.show(*op_tables(rows))
    warn(load)
    if out:
        picture(rows, out.with_suffix(".png"))
        write_page(out.with_suffix(".html"), record, rows)
    _end(answer, out, summaries(rows), load=load.record(), environment=facts)


def _turns(units: list, one, processes: int):
    """`in_turns`, with a bar over all turns; what comes first is how many there are."""
    from ..bench.turns import in_turns

    total = processes * len(units)
    say(f"Turns: {total} (cases: {len(units)}, processes: {processes})")
    with bar("bench") as show:
        show(0, total, _name(units[0]))
        for done, (i, rows) in enumerate(in_turns(units, one, processes), 1):
            yield i, rows
            show(done, total, _name(units[done % len(units)]))


def _name(unit: object) -> str:
    return getattr(unit, "name", str(unit))


def _end(answer: Answer, out: Path | None, rows: list[dict], **more: object) -> None:
    """Where the page lies, and the command that comes next."""
    after = None
    if out:
        say(f"Page: {out.with_suffix('.html')}")
        if any(row["seconds"] for row in rows):
            say("After a change, measure the same again with --out NEW.json.")
            after = command_line("bench", "compare", str(out), "NEW.json")
            next_command(after)
    answer.end(out=out, rows=rows, next=after, **more)


def _rounds(processes: int) -> int:
    """At least, of each process: its median."""
    return 5 if processes == 1 else 3


@app.command("steps")
def steps_command(
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE", help="Recipe, by name or as a .toml file, whose sizes are taken."
        ),
    ] = "fair",
    models: Annotated[
        str,
        typer.Option(metavar="A,B", help="Names of models, separated by commas, or all."),
    ] = "mlp,cnn",
    attentions: Annotated[
        str,
        typer.Option(metavar="A,B", help="Names of attention mechanisms, or all."),
    ] = "all",
    plugin: options.Plugin = None,
    patch: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Sizes of the patches of the vit, separated by commas: 8, 4, 2 and 1 pixels make "
            "16, 64, 256 and 1024 tokens of an image; by default as in the recipe.",
        ),
    ] = None,
    overrides: options.Overrides = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Number of images in a batch; by default as in the recipe."
        ),
    ] = None,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory", help="Measure the peak memory of a step, too, each in its own process."
        ),
    ] = False,
    ceiling: Annotated[
        bool,
        typer.Option(
            "--ceiling",
            help="Time each mechanism with an attention that costs nothing, too, which is what no "
            "kernel can beat.",
        ),
    ] = False,
    device: On = "cpu",
    budget: Budget = 3.0,
    processes: Processes = 5,
    threads: options.Threads = None,
    out: Out = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Time whole training steps, against the control and against plain PyTorch attention.

    With --models vit --patch 4,2,1 against the number of tokens, too; tab lengths draws it."""
    answer = Answer(quiet=quiet, as_json=as_json)
    before_work()
    use_threads(threads)
    from ..analysis.steps import add_memory, steps, subjects
    from ..bench.page import write_page
    from ..bench.results import environment, save
    from ..bench.turns import Load
    from ..recipe.names import variants
    from ..recipe.recipe import parse_override
    from .bench_tables import steps_table, summaries

    facts, load, found = environment(device), Load(), {}
    use_plugins(plugin)
    kinds, names = variants(models, attentions)
    sizes = [parse_override(f"patch={size}")[1] for size in patch.split(",")] if patch else []
    changes = dict(map(parse_override, overrides or []))
    units = subjects(recipe, kinds, sizes, changes)
    one = partial(
        steps,
        attentions=names,
        batch=batch,
        device=device,
        ceiling=ceiling,
        budget=budget / processes,
        min_rounds=_rounds(processes),
    )

    def keep() -> list:
        rows = [row for mine in found.values() for row in mine]
        load.note()
        if out:
            record = save(out, rows, None, facts, command(), load.record())
            write_page(out.with_suffix(".html"), record, rows)
        return rows

    for i, group in _turns(units, one, processes):
        found[i] = group
        rows = keep()
    for i, group in found.items() if memory else ():
        add_memory(group, units[i], device)
        rows = keep()
    answer.show(*map(steps_table, found.values()))
    warn(load)
    _end(answer, out, summaries(rows), load=load.record(), environment=facts)
