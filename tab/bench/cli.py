"""`tab bench` and `tab bench compare`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help="Microbenchmark the ops against what you could run instead.")

DTYPES = ("float32", "bfloat16", "float16")


def _chosen(given: str, known: tuple[str, ...] | list[str], what: str) -> list[str]:
    names = list(known) if given == "all" else given.split(",")
    if unknown := [n for n in names if n not in known]:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; choose from {', '.join(known)}")
    return names


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    ops: Annotated[str, typer.Option(help="Comma-separated, or all.")] = "all",
    sizes: Annotated[str, typer.Option(help="Comma-separated names of sizes.")] = "vision",
    causal: Annotated[str, typer.Option(help="no, yes or both.")] = "no",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    directions: Annotated[str, typer.Option(help="forward, backward, both.")] = "forward,both",
    contestants: Annotated[str, typer.Option(help="Names (prefixes), or all.")] = "all",
    budget: Annotated[float, typer.Option(help="Seconds per contestant and direction.")] = 3.0,
    cold: Annotated[bool, typer.Option(help="Empty the caches before each call.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON; a PNG is put beside it.")] = None,
) -> None:
    """Check each contestant against float64, then time them in turns."""
    if context.invoked_subcommand:
        return
    import torch

    from .cases import SIZES, cases
    from .contestants import PYTORCH
    from .measure import DIRECTIONS, measure
    from .results import picture, save, tables
    from .roofline import measure_roofline

    console = Console()
    kind = getattr(torch, _chosen(dtype, DTYPES, "dtype")[0])
    wanted = tuple(_chosen(directions, DIRECTIONS, "direction"))
    flags = {"no": (False,), "yes": (True,), "both": (False, True)}[
        _chosen(causal, ("no", "yes", "both"), "value of --causal")[0]
    ]
    prefixes = None if contestants == "all" else tuple(contestants.split(","))
    every = _chosen(ops, list(PYTORCH), "op"), _chosen(sizes, list(SIZES), "size")
    chosen = cases(*every, flags, kind, device)
    roofline = measure_roofline(kind, device)
    console.print(
        f"ceilings of this run: {roofline.flops / 1e9:.0f} GFLOP/s, "
        f"{roofline.bandwidth / 1e9:.1f} GB/s"
    )
    rows = []
    for case in chosen:
        rows += measure(
            case,
            roofline,
            directions=wanted,
            budget=budget,
            cold=cold,
            only=lambda name: prefixes is None or name == "tab" or name.startswith(prefixes),
        )
        console.print(tables([row for row in rows if row.case == case.name])[0])
        if out:  # after each case, so that what was measured is kept
            save(out, rows, roofline, device, shlex.join(["tab", *sys.argv[1:]]))
    if out:
        picture(rows, out.with_suffix(".png"))
        console.print(f"wrote {out} and {out.with_suffix('.png')}")


@app.command("compare")
def compare_runs(
    old: Path,
    new: Path,
    alpha: Annotated[float, typer.Option(help="Significance after Holm.")] = 0.01,
    effect: Annotated[float, typer.Option(help="Least relative change that counts.")] = 0.05,
) -> None:
    """Rank test between two results; exit code 1 when anything of TAB's got slower."""
    from .regress import compare
    from .results import load

    changes = compare(load(old)[1], load(new)[1], alpha=alpha, effect=effect)
    table = Table("case", "contestant", "direction", "old ms", "new ms", "change", "p", "")
    for c in changes:
        colour = {"slower": "red", "faster": "green"}.get(c.verdict, "dim")
        change = f"{100 * (c.new / c.old - 1):+.1f} %"
        cells = [c.case, c.contestant, c.direction, f"{1e3 * c.old:.3f}", f"{1e3 * c.new:.3f}"]
        table.add_row(*cells, change, f"{c.p:.2g}", f"[{colour}]{c.verdict}[/{colour}]")
    Console().print(table)
    if any(c.verdict == "slower" and c.contestant.startswith("tab") for c in changes):
        raise typer.Exit(1)
