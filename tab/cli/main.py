"""The command line: `tab` and its commands, one a file.

What needs torch is imported inside the commands, so that --help is quick.
"""

from __future__ import annotations

import gc
import signal
from typing import Annotated

import typer

from .. import __version__
from . import (
    bench,
    check,
    compare,
    data,
    doctor,
    lengths,
    listed,
    recipe,
    report,
    robustness,
    sweep,
    train,
)
from .terminal import Commands, command_group, say

app = command_group(
    "TAB: which attention, how fast, and does it help?",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compare")(compare.command)
app.command("train")(train.command)
app.command("data")(data.command)
app.command("report")(report.command)
app.command("lengths")(lengths.command)
app.command("robustness")(robustness.command)
app.command("doctor")(doctor.command)
app.command("check")(check.command)
app.command("list")(listed.command)
app.add_typer(sweep.app, name="sweep")
app.add_typer(bench.app, name="bench")
app.add_typer(recipe.app, name="recipe")

Debug = Annotated[bool, typer.Option("--debug", help="Show where an error arose.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Debug = False,  # noqa: ARG001 (terminal.Commands reads it)
) -> None:
    if version:
        say(f"tab {__version__}")
        raise typer.Exit()


def main() -> None:
    try:
        app()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is written and said
        gc.freeze()  # else Python's end searches all of PyTorch for circles: half a second
