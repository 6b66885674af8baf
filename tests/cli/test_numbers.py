"""Numbers that nothing can be compared with, and places that cannot be written, are refused before
anything is measured or trained."""

from pathlib import Path

import pytest
import typer
from small_cli import flat, tab

import tab as library
from tab.cli.main import app


def fractions(command, words: tuple[str, ...] = ()):
    """(words of a command, its option) for each that takes a fraction, in all commands."""
    for each in command.params:
        if each.metavar == "X":
            yield words, each.opts[0]
    for name, below in getattr(command, "commands", {}).items():
        yield from fractions(below, (*words, name))


FRACTIONS = [*fractions(typer.main.get_command(app))]
NEEDED = {("bench", "compare"): ("old.json", "new.json")}  # arguments


@pytest.mark.parametrize("given", ["nan", "inf", "-1"])
@pytest.mark.parametrize(
    ("words", "option"), FRACTIONS, ids=lambda x: x if isinstance(x, str) else "-".join(x)
)
def test_a_number_that_is_none_is_refused_by_name(words, option, given):
    """--effect nan found nothing slower, whatever was."""
    cluster = ("--ray", "") if option == "--gpus-per-task" else ()
    result = tab(*words, *NEEDED.get(words, ()), option, given, *cluster)
    assert result.exit_code == 2 and given in result.stderr, result.output
    assert option.strip("-") in result.stderr and "Traceback" not in result.output


def test_there_are_such_options():
    assert {("bench",), ("bench", "compare"), ("sweep",)} <= {words for words, _ in FRACTIONS}


@pytest.mark.parametrize("command", ["", "decode", "growth", "memory", "steps"])
@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("r.html", "give r.json"),
        ("r.png", "give r.json"),
        (".", "is a directory: give a file in it"),
        ("file/r.json", "file"),
    ],
)
def test_where_no_result_can_lie_nothing_is_measured(command, out, said, tmp_path, monkeypatch):
    """The page or the picture took the place of the results."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    result = tab("bench", *([command] if command else []), "--out", out)
    assert result.exit_code == 2 and said in flat(result.stderr), result.output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"processes": 0}, "processes = 0: give 1 or more"),
        ({"budget": float("nan")}, "budget = nan: give a number of seconds"),
        ({"budget": -1.0}, r"budget = -1\.0: give a number of seconds"),
        ({"out": "r.png"}, r"give r\.json"),
    ],
    ids=str,
)
def test_from_python_too(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        library.bench("linear", "tiny", tell=None, **given)
