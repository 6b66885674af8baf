"""What every command shares: the consoles, tables, one bar, and how errors and Control-C end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from typer.core import TyperGroup


def plain(**options) -> Console:
    """A console that prints text as it is: in the names of classes, paths and mechanisms neither
    [red] nor :smile: means anything. Colours are given as `style`, or as rich.text.Text."""
    return Console(markup=False, emoji=False, highlight=False, **options)


console = plain()
errors = plain(stderr=True)


def say(text: str, *, style: str | None = None, to: Console = console) -> None:
    """One line, however long: a path in it can be copied."""
    to.print(text, style=style, soft_wrap=True)


class Commands(TyperGroup):
    """Bad input and failures that explain themselves print as one red line; --debug shows where."""

    def invoke(self, ctx):
        for stream in (sys.stdout, sys.stderr):  # a name may be no text, or not in their encoding
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            # typer's own signals (Exit, Abort) are RuntimeErrors.
            if ctx.params.get("debug") or type(error).__module__.startswith(("typer", "click")):
                raise
            lines = (line.strip() for line in str(error).splitlines())
            text = " ".join(filter(None, lines)) or type(error).__name__
            say(f"error: {text}", style="bold red", to=errors)
            raise typer.Exit(2) from error


@contextmanager
def or_resume(command: str) -> Iterator[None]:
    """Control-C says how to go on and exits with 130; a disk that fails says so too."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{error}; when that is mended, go on with: {command}") from error
    except KeyboardInterrupt:
        say(f"\nstopped; go on with: {command}", style="yellow", to=errors)
        raise typer.Exit(130) from None


def command_line(*words: str, **options: object) -> str:
    """The command that says the same: True is a flag, a list an option given several times, and
    what is None or False was not given."""
    parts = ["tab", *words]
    for key, value in options.items():
        if value is True:
            parts.append(f"--{key}")
        elif value is not None and value is not False:
            given = value if isinstance(value, list) else [value]
            parts += [f"--{key}={each}" for each in given]
    return " ".join(map(shlex.quote, parts))


@contextmanager
def bar(name: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yields show(done, total, what): a bar that goes away at the end, on a terminal only."""
    columns = (
        TextColumn("{task.description}", style="progress.description", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    still = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=still) as progress:
        task = progress.add_task(name, total=None)

        def show(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what)

        yield show


def wide() -> Console:
    """A log has no width of its own: tables there are not folded at 80 columns."""
    return console if console.is_terminal else plain(width=140)


def pairs(title: str, rows: list[tuple[str, object]]) -> None:
    """A table of names and values."""
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    for key, value in rows:
        table.add_row(key, "–" if value is None else str(value))
    wide().print(table)
