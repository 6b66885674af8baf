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

Out = Annotated[Path | None, typer.Option(help="JSON; PNG and HTML are put beside it.")]
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
    out: Out = None,
) -> None:
    """Check each contestant against float64, then time them in turns."""
    if context.invoked_subcommand:
        return
    import torch

    from .cases import SIZES, cases
    from .contestants import PYTORCH
    from .measure import DIRECTIONS, measure
    from .page import write_page
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
            record = save(out, rows, roofline, device, _command())
    if out:
        picture(rows, out.with_suffix(".png"))
        write_page(out.with_suffix(".html"), record, rows)
        console.print(f"wrote {out}, and .png and .html beside it")


@app.command("steps")
def steps_command(
    recipe: Annotated[str, typer.Option(help="Sizes: a recipe or a file.")] = "fair",
    models: Annotated[str, typer.Option(help="mlp, cnn, resnet9 or all.")] = "mlp,cnn",
    attentions: Annotated[str, typer.Option(help="Comma-separated, or all.")] = "all",
    batch: Annotated[int | None, typer.Option(min=1, help="Images; default: recipe's.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    budget: Annotated[float, typer.Option(help="Seconds per contestant.")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="JSON; HTML is put beside it.")] = None,
) -> None:
    """Whole training steps of the models, against control and against plain PyTorch attention."""
    from ..layers import attention_names
    from ..models import model_names
    from ..recipe import load_recipe
    from .page import write_page
    from .results import save, steps_table
    from .steps import steps

    console, rows = Console(), []
    names = _chosen(attentions, attention_names(), "attention")
    for model in _chosen(models, model_names(), "model"):
        new = steps(load_recipe(recipe), model, names, batch=batch, device=device, budget=budget)
        rows += new
        console.print(steps_table(new))
        if out:
            write_page(out.with_suffix(".html"), save(out, rows, None, device, _command()), rows)


@app.command("memory")
def memory_command(
    ops: Annotated[str, typer.Option(help="Comma-separated, or all.")] = "all",
    longest: Annotated[int, typer.Option(help="The last N.")] = 16384,
    out: Out = None,
) -> None:
    """Peak memory of each op, forward and backward, against N on the CPU, and how it grows."""
    from .contestants import PYTORCH
    from .memory import LENGTHS, memory, picture
    from .page import write_page
    from .results import memory_table, save

    console, rows = Console(), []
    if longest < LENGTHS[1]:
        raise ValueError(f"longest {longest}: growth needs two N; at least {LENGTHS[1]}")
    for op in _chosen(ops, list(PYTORCH), "op"):
        new = memory(op, tuple(n for n in LENGTHS if n <= longest))
        rows += new
        console.print(memory_table(new))
        if out:
            write_page(out.with_suffix(".html"), save(out, rows, None, "cpu", _command()), rows)
    if out:
        picture(rows, out.with_suffix(".png"))


def _command() -> str:
    return shlex.join(["tab", *sys.argv[1:]])


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
