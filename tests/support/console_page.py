"""A page whose examples are run: what stands below each `$ tab …` is what the command prints.

    python tests/support/console_page.py docs/cli.md     # writes anew what the commands print

In a fenced block of the kind `console`, each line with `$ ` is run in one folder, from the top of
the page to its end, at 80 columns. A line `[…]` stands for any number of lines: it is written by
hand, between the first lines and the last ones that are kept.
"""

import os
import re
import shlex
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

from typer.testing import CliRunner

from tab.cli import terminal
from tab.cli.main import app

BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LEFT_OUT = "[…]"
WIDTH = 80


def examples(text: str) -> list[tuple[str, str]]:
    """(command, what stands below it) of all blocks."""
    parts = [re.split(r"^\$ ", body, flags=re.MULTILINE)[1:] for body in BLOCK.findall(text)]
    return [tuple(part.split("\n", 1)) for body in parts for part in body]


def said(command: str) -> str:
    """By the command, in this process and the current folder; both streams, as a terminal shows."""
    given = shlex.split(command)
    assert given[0] == "tab", command
    for each in (terminal.console, terminal.results, terminal.errors):
        each.width = WIDTH
    quiet = mock.patch("tab.machine.load", lambda: 0.0), mock.patch("tab.bench.turns.BUSY", 1e9)
    try:
        with quiet[0], quiet[1]:
            result = CliRunner().invoke(app, given[1:])
    finally:
        for each in (terminal.console, terminal.results, terminal.errors):
            each._width = None
    assert result.exit_code in (0, 1, 2) and result.output, (command, result.exception)
    lines = result.output.replace(os.getcwd(), "~").rstrip().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def words(text: str) -> Counter[str]:
    """What the outputs of two machines have in common. Numbers and their units differ, and so do
    who is better by them, where a line is folded, and whether other work disturbed a time."""
    text = re.sub(r"^\*: .*\n(?:[a-z].*\n)?", "", text, flags=re.MULTILINE)
    text = re.sub(r"one step( of .*)? was timed", "", text)  # of all variants, if there is time
    text = re.sub(r"[-+−]?\d[\d.,]*(e[-+]?\d+)?( ?(%|s|min|h)(?= |$|:))?", "", text)
    text = re.sub(r"(better|worse)(, by less than)?|undecided|equivalent within", "", text)
    text = re.sub(r"not told apart|\b(same|slower|faster)\b", "", text)
    return Counter(re.findall(r"[^\W\d_][\w/.]+", text))


def agree(stands: str, printed: str) -> bool:
    """Whether the page shows what was printed, but for what it leaves out."""
    there, here = words(stands.replace(LEFT_OUT, "")), words(printed)
    return not there - here if LEFT_OUT in stands else there == here


def shortened(stands: str, printed: str) -> str:
    """What was printed, with as much left out as before."""
    if LEFT_OUT not in stands:
        return printed
    first, *_, last = (part.count("\n") for part in stands.split(f"{LEFT_OUT}\n"))
    lines = printed.splitlines(keepends=True)
    return "".join([*lines[:first], f"{LEFT_OUT}\n", *lines[len(lines) - last :]])


def rewrite(path: Path) -> None:
    text, home = path.read_text(encoding="utf-8"), os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for command, stands in examples(text):
            new = shortened(stands, said(command))
            text = text.replace(f"$ {command}\n{stands}", f"$ {command}\n{new}", 1)
        os.chdir(home)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    rewrite(Path(sys.argv[1]))
