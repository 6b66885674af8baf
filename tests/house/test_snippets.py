"""What the documents tell a reader to type exists, and their Python runs."""

import re
import shlex
import tomllib

import pytest
import typer
from documents import DOCUMENTS, blocks, name_of, run_blocks, text_of
from paths import ROOT

from tab.cli.main import app
from tab.layers import _registry

TAB = typer.main.get_command(app)
EXTRAS = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
TOOLS = {"git", "ray", "optuna-dashboard", "tensorboard"}  # not ours


def commands(block: str) -> list[list[str]]:
    """The words of each line, without comments. <time> and the like are words, not redirections."""
    joined = block.replace("\\\n", " ")
    found = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [words for words in found if words]


def parse(words: list[str]) -> None:
    """A command of `tab`: an unknown name or option, or a value of the wrong kind, raises."""
    command, args, context = TAB, words[1:], None
    while True:
        context = command.make_context(command.name, [*args], parent=context)
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        if not (rest and hasattr(command, "get_command")):
            return
        command, args = command.get_command(context, rest[0]), rest[1:]
        assert command, f"tab has no command {rest[0]}"


def check(words: list[str]) -> None:
    while "=" in words[0] and not words[0].startswith("-"):  # variables before a command
        words = words[1:]
    program = words[0]
    if program == "tab":
        parse(words)
    elif program == "make":
        assert set(words[1:]) <= TARGETS, words
    elif program == "pip":
        asked = [extra for word in words for extra in re.findall(r"\[(\w+)\]", word)]
        assert words[1] == "install" and set(asked) <= set(EXTRAS), words
    elif program in ("python", "pytest"):
        files = [word for word in words[1:] if word.endswith(".py") or word == "bench"]
        assert all((ROOT / file).exists() for file in files), words
    else:
        assert program in TOOLS or (ROOT / program).exists(), words


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_exist(path):
    for block in blocks(path, "sh"):
        for words in commands(block):
            check(words)


@pytest.mark.parametrize(
    "line",
    ["tab compore", "tab compare --seds 5", "tab bench --seeds x", "make nothing", "nothing"],
)
def test_a_command_that_does_not_exist_is_found(line):
    with pytest.raises((AssertionError, Exception), match=r"(?i)no.* (command|option)|nothing"):
        check(shlex.split(line))


def test_every_target_of_make_is_described():
    told = "".join(text_of(ROOT / name) for name in ("README.md", "CONTRIBUTING.md"))
    assert not {target for target in TARGETS - {"clean", "oldest"} if f"make {target}" not in told}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_runs(path, tmp_path, monkeypatch):
    """The blocks of a page, from its top to its end. One that trains for long says why it is not
    run, in a comment before it: <!-- not run: trains for minutes -->"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_registry, "_layers", dict(_registry._layers))
    names = {"__name__": "snippet"}
    for body, run in run_blocks(path, "python"):
        code = compile(body, name_of(path), "exec")
        if run:
            exec(code, names)


def test_readme_shows_python_that_runs():
    assert [run for _, run in run_blocks(ROOT / "README.md", "python")] == [True]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_toml_is_toml(path):
    for block in blocks(path, "toml"):
        tomllib.loads(block)
