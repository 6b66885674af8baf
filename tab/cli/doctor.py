"""`tab doctor`: what can run here."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from .terminal import pairs, say, wide


def command(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Print the table of compiled kernels as well.")
    ] = False,
) -> None:
    """Say what is installed and built, and which backend of which operator can run here."""
    from ..doctor.doctor import backends, versions

    pairs("TAB", versions())
    found = backends()
    names = list(next(iter(found.values())))
    table = Table("operator", *names, title="Backends", title_justify="left", title_style="bold")
    why: dict[str, list[str]] = {}
    for op, row in found.items():
        marks = (Text("no", "dim") if reason else Text("yes", "green") for reason in row.values())
        table.add_row(op, *marks)
        for backend, reason in row.items():
            if reason:
                why.setdefault(f"{backend}: {reason.removeprefix(f'{op} ')}", []).append(op)
    wide().print(table)
    for reason, ops in why.items():
        which = "" if len(ops) == len(found) else f" ({', '.join(ops)})"
        say(f"no {reason}{which}", style="dim")
    if kernels:
        from ..doctor.kernel_report import print_kernel_report

        print_kernel_report()
