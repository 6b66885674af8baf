"""What every command shares: the consoles, tables, one bar, and how errors and Control-C end."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from typer.core import TyperGroup

console = Console(markup=False)  # paths and names may hold [brackets]
errors = Console(stderr=True, markup=False)


class Commands(TyperGroup):
    """Bad input and failures that explain themselves print as one red line; --debug shows where."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            # typer's own signals (Exit, Abort) are RuntimeErrors.
            if ctx.params.get("debug") or type(error).__module__.startswith(("typer", "click")):
                raise
            text = str(error) or type(error).__name__
            say = {"style": "bold red", "markup": False, "highlight": False, "soft_wrap": True}
            errors.print(f"error: {text}", **say)
            raise typer.Exit(2) from error


@contextmanager
def or_resume(command: str) -> Iterator[None]:
    """Control-C says how to go on and exits with 130; a disk that fails says so too."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{error}; when that is mended, go on with: {command}") from error
    except KeyboardInterrupt:
        say = {"style": "yellow", "markup": False, "highlight": False, "soft_wrap": True}
        errors.print(f"\nstopped; go on with: {command}", **say)
        raise typer.Exit(130) from None


def command_line(*words: str, overrides: list[str] | None, **options) -> str:
    """The command that says the same."""
    words = [*words, *(f"--set={text}" for text in overrides or [])]
    words += [f"--{key}={value}" for key, value in options.items() if value is not None]
    return " ".join(["tab", *map(shlex.quote, words)])


@contextmanager
def bar(name: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yields show(done, total, what): a bar that goes away at the end, on a terminal only."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None)

        def show(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=escape(what))

        yield show


def wide() -> Console:
    """A log has no width of its own: tables there are not folded at 80 columns."""
    return console if console.is_terminal else Console(width=140, markup=False)


def pairs(title: str, rows: list[tuple[str, object]]) -> None:
    """A table of names and values."""
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    for key, value in rows:
        table.add_row(key, "–" if value is None else str(value))
    wide().print(table)
