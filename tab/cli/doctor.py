"""`tab doctor`: what can run here."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer
from rich.text import Text

from . import options
from .answer import Answer, pairs, table
from .terminal import bar, console, say


def command(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Print the table of compiled kernels as well.")
    ] = False,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Compile for this GPU architecture (sm_80, sm_90, …) or for all; "
            "by default for this machine's GPU, without one for sm_90.",
        ),
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--every-launch", help="Compile each launch, not only the most demanding."),
    ] = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Say what is installed and built, and which backend of which operator can run here."""
    from ..doctor.doctor import backends, versions

    if (every or arch) and not kernels:
        given = "--every-launch" if every else "--arch"
        raise typer.BadParameter(f"{given} says which kernels to compile: give --kernels, too")
    archs = _archs(arch) if kernels else ()
    answer = Answer(quiet=quiet, as_json=as_json)
    facts, found = versions(), backends()
    tools, doubts = _assemblers(archs)
    facts += tools
    answer.show(pairs("TAB", facts))
    names = list(next(iter(found.values())))
    made = table("Backends", "Operator", *names)
    why: dict[str, list[str]] = {}
    for op, row in found.items():
        marks = (Text("no", "dim") if reason else Text("yes", "green") for reason in row.values())
        made.add_row(op, *marks)
        for backend, reason in row.items():
            if reason:
                own = reason.removeprefix(f"{op} has ")  # "no cpp kernel"
                text = own.capitalize() if own != reason else f"No {backend}, since {reason}"
                why.setdefault(text, []).append(op)
    answer.show(made)
    for reason, ops in why.items():
        which = "" if len(ops) == len(found) else f": {', '.join(ops)}"
        console.print(Text(f"{reason}{which}", "dim"))  # nobody copies it: it may break
    for text in doubts:
        say(text, style="yellow")
    more = _gpu(answer, archs, every) if kernels else {}
    wrong = more.get("faults", [])
    answer.end(versions=dict(facts), backends=found, **more)
    for fault in wrong:
        say(fault, style="red")
    if wrong:
        raise typer.Exit(1)


def _archs(name: str | None) -> tuple[int, ...]:
    """The architectures that --arch names."""
    from ..doctor.kernel_report import SHARED_LIMIT, own_arch

    known = {f"sm_{arch}": (arch,) for arch in SHARED_LIMIT} | {"all": tuple(SHARED_LIMIT)}
    if name is None:
        return (own_arch(),)
    if name not in known:
        raise typer.BadParameter(f"--arch={name} is none of {', '.join(known)}")
    return known[name]


def _assemblers(archs: tuple[int, ...]) -> tuple[list[tuple[str, str]], list[str]]:
    """The ptxas that Triton takes for these, or for the GPU that is here, and doubts about it."""
    import torch

    if find_spec("triton") is None or not (archs or torch.cuda.is_available()):
        return [], []
    from ..doctor.kernel_compile import assembler, doubt
    from ..doctor.kernel_report import own_arch

    archs = archs or (own_arch(),)
    try:
        found = [(f"ptxas, sm_{arch}", assembler(arch).version) for arch in archs]
        return found, [text for text in map(doubt, archs) if text]
    except (ImportError, RuntimeError, OSError) as error:  # a Triton for AMD; no ptxas
        return [("ptxas", f"not found: {error}")], []


def _gpu(answer: Answer, archs: tuple[int, ...], every: bool) -> dict[str, list]:
    """What the GPU kernels take, what of that is too much, and the least that their calls need."""
    from ..doctor.kernel_limits import faults

    rows = _kernels(answer, archs, every)
    return {"kernels": rows, "faults": faults(rows), "floors": _floors(answer)}


def _kernels(answer: Answer, archs: tuple[int, ...], every: bool) -> list[dict]:
    """What each compiled GPU kernel takes; one that takes more than it may is marked."""
    from ..doctor.kernel_limits import faults
    from ..doctor.kernel_report import report_rows

    with bar("kernels") as show:
        rows = report_rows(archs, progress=show, every=every)
    heads = ("Kernel", "Configuration", "sm", "Registers", "Spilled", "Shared KiB", "Warps")
    note = "Of a thread: registers, bytes spilled. Of a block: shared memory, of its limit. "
    note += "Of a multiprocessor: warps, in blocks, that it holds at once."
    named = ", ".join(f"sm_{arch}" for arch in archs)
    made = table(f"Kernels on {named}", *heads, right=heads[2:], note=note)
    for row in rows:
        numbers = map(str, (row["arch"], row["registers"], row["spilled"]))
        shared = f"{row['shared'] / 1024:.0f} of {row['limit'] // 1024}"
        config = f"{row['config']} without {row['without']}".removesuffix(" without ")
        cells = (f"{row['op']}: {row['kernel']}", config, *numbers, shared)
        held = f"{row['warps']} in {row['blocks']}"
        made.add_row(*cells, held, style="red" if faults([row]) else None)
    answer.show(made)
    return rows


def _floors(answer: Answer) -> list[dict]:
    """The least that each call of a GPU kernel takes."""
    from ..doctor.kernel_floors import GPU, call_floors

    rows = call_floors()
    heads = ("Call, first operand", "Launches", "GFLOP", "MB", "Moved", "Bound by", "µs")
    note = "The floor of bytes and of FLOPs, whichever is larger. MB: operands and results, once; "
    note += "Moved: those of each launch."
    made = table(f"Floors on an {GPU}", *heads, right=(*heads[1:5], "µs"), note=note)
    for row in rows:
        amounts = (row["flops"] / 1e9, row["bytes"] / 1e6, row["moved"] / 1e6)
        cells = (f"{row['op']} {row['size']} {row['type']}", str(len(row["launches"])))
        made.add_row(*cells, *(f"{x:.1f}" for x in amounts), row["bound"], f"{row['floor_us']:.1f}")
    answer.show(made)
    return rows
