"""What every command shares: the consoles, one bar, and how errors, Control-C and SIGTERM end."""

from __future__ import annotations

import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from typer.core import TyperGroup

from ..machine import told


def plain(**options) -> Console:
    """A console that prints text as it is: in the names of classes, paths and mechanisms neither
    [red] nor :smile: means anything. Colours are given as `style`, or as rich.text.Text."""
    return Console(markup=False, emoji=False, highlight=False, **options)


console = plain()  # what is told on the way
results = plain()  # the tables at the end
errors = plain(stderr=True)


def say(text: str, *, style: str | None = None, to: Console = console) -> None:
    """One line, however long: a path in it can be copied."""
    to.print(text, style=style, soft_wrap=True)


def next_command(command: str) -> None:
    """The one that comes next, as it can be pasted into a shell."""
    say(f"Next: {command}")


def command_group(help: str, **options) -> typer.Typer:
    """Its help is plain text, which fits 60 columns: the boxes of rich cut the names there."""
    return typer.Typer(**{"cls": Group, **options}, help=help, rich_markup_mode=None)


# --- how a command ends ---------------------------------------------------------------------------


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a batch system sends it: all that Control-C does is done."""


class Group(TyperGroup):
    """Its list of commands has their sentences whole."""

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            commands = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
            formatter.write_dl([(name, each.help.split("\n\n")[0]) for name, each in commands])


class Commands(Group):
    """Bad input and failures that explain themselves print as one red line; --debug shows where."""

    def make_context(self, *args, **options):
        with _usage_in_one_line():
            return super().make_context(*args, **options)

    def invoke(self, ctx):
        with _usage_in_one_line(), _signals():
            return self._invoke(ctx)

    def _invoke(self, ctx):
        for stream in (sys.stdout, sys.stderr):  # a name may be no text, or not in their encoding
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _stopped(stop, "the same command begins again") from None
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            # typer's own signals (Exit, Abort) are RuntimeErrors.
            if ctx.params.get("debug") or type(error).__module__.startswith(("typer", "click")):
                raise
            text = told(error) if isinstance(error, OSError) else str(error)
            _tell(text or type(error).__name__)
            raise typer.Exit(2) from error
        finally:  # what this command was told, --quiet and --json, is not for who prints next
            for each in (console, results):
                each.quiet, each.stderr = False, False


def _tell(error: str) -> None:
    """In one line, whatever lines it has."""
    text = " ".join(filter(None, (line.strip() for line in error.splitlines())))
    say(f"error: {text}", style="bold red", to=errors)


UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer has it, under no public name


@contextmanager
def _usage_in_one_line() -> Iterator[None]:
    """What typer refuses is told as all bad input is, with the value that was given and where the
    help is; typer would print three lines, and not always the value."""
    try:
        yield
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # whose message is the help itself
            raise
        text = error.format_message().replace("Value error, ", "").rstrip(".")
        if hasattr(error.__cause__, "errors"):  # pydantic's, which knows what was given
            given = repr(error.__cause__.errors()[0]["input"])
            text += "" if given in text else f"; given was {given}"
        path = error.ctx.command_path if error.ctx else "tab"
        _tell(f"{text} (see {path} --help)")
        raise typer.Exit(2) from error


@contextmanager
def or_resume(command: Callable[[], str]) -> Iterator[None]:
    """Control-C and SIGTERM say how to go on, by what is the command then; so does a disk that
    fails."""
    try:
        yield
    except OSError as error:
        text = f"{told(error)}; when that is mended, go on with: {command()}"
        raise OSError(text) from error
    except KeyboardInterrupt as stop:
        raise _stopped(stop, f"go on with: {command()}") from None


def _stopped(stop: KeyboardInterrupt, how_on: str) -> typer.Exit:
    """Says so. The exit code is as shells count: 128 and the number of the signal."""
    say(f"\nstopped; {how_on}", style="yellow", to=errors)
    return typer.Exit(128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT))


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM stops as Control-C does. Another one within a second of the first is the same wish:
    it would only take the last words away. A later one stops what the first began to end."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    heard = -math.inf

    def stop(number: int, _) -> None:
        nonlocal heard
        before, heard = heard, time.monotonic()
        if heard - before > 1:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    kinds = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is not to be heard
        kinds.append(signal.SIGINT)
    before = [(each, signal.signal(each, stop)) for each in kinds]
    try:
        yield
    finally:
        for each, handler in before:
            signal.signal(each, handler)


def command_line(*words: str, **options: object) -> str:
    """The command that says the same: True is a flag, a list an option given several times, and
    what is None or False was not given."""
    parts = ["tab", *words]
    for key, value in options.items():
        if value is True:
            parts.append(f"--{key.replace('_', '-')}")
        elif value is not None and value is not False:
            given = value if isinstance(value, list) else [value]
            parts += [f"--{key.replace('_', '-')}={each}" for each in given]
    return " ".join(map(shlex.quote, parts))


# --- bars -----------------------------------------------------------------------------------------


@contextmanager
def bar(name: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yields show(done, total, what): a bar that goes away at the end, on a terminal only."""
    columns = (
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        # Last, and folded where the terminal is narrow: a name is never cut.
        TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
    )
    with Progress(*columns, console=console, transient=True, disable=not live()) as progress:
        task = progress.add_task(name, total=None)

        def show(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=f"{name}: {what}")

        yield show


def live() -> bool:
    """Whether bars can be seen: on a terminal, unless --quiet is given."""
    return console.is_terminal and not console.quiet
