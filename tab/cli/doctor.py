"""`tab doctor`: what can run here."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from . import options
from .answer import Answer, pairs, table
from .terminal import bar, console


def command(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Print the table of compiled kernels as well.")
    ] = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Say what is installed and built, and which backend of which operator can run here."""
    from ..doctor.doctor import backends, versions

    answer = Answer(quiet=quiet, as_json=as_json)
    facts, found = versions(), backends()
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
    more = {"kernels": _kernels(answer)} if kernels else {}
    answer.end(versions=dict(facts), backends=found, **more)


def _kernels(answer: Answer) -> list[dict]:
    """What each compiled GPU kernel takes; one that spills or does not fit is marked."""
    from ..doctor.kernel_report import report_rows

    with bar("kernels") as show:
        rows = report_rows(progress=show)
    heads = ("Kernel", "Configuration", "sm", "Registers", "Spilled", "Shared KiB")
    note = "Registers of a thread, bytes that it spills, shared memory of a block of its limit."
    made = table("Kernels", *heads, right=heads[2:], note=note)
    for row in rows:
        bad = row["spilled"] > 0 or row["shared"] > row["limit"]
        shared = f"{row['shared'] / 1024:.0f} of {row['limit'] // 1024}"
        numbers = map(str, (row["arch"], row["registers"], row["spilled"]))
        cells = (f"{row['op']}: {row['kernel']}", row["config"], *numbers, shared)
        made.add_row(*cells, style="red" if bad else None)
    answer.show(made)
    return rows
