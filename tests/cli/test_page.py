"""docs/cli.md shows each command once, and what it prints."""

from multiprocessing import get_context

import pytest
import typer
from console_page import agree, examples, said
from documents import blocks, text_of
from paths import ROOT

from tab.cli.main import app

pytestmark = pytest.mark.slow  # the commands, for the first test of them

PAGE = ROOT / "docs" / "cli.md"
EXAMPLES = examples(text_of(PAGE))


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """By each command, one after the other in one folder. What a benchmark measures in a process
    of its own is measured in a fork: that the process is a new one, test_regress.py shows."""

    def forks(kind: str):
        context = get_context("forkserver")
        context.set_forkserver_preload(["tab.bench.measure"])
        return context

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("multiprocessing.get_context", forks)
        patched.chdir(tmp_path_factory.mktemp("page"))
        return {command: said(command) for command, _ in EXAMPLES}


@pytest.mark.parametrize(("command", "stands"), EXAMPLES, ids=[command for command, _ in EXAMPLES])
def test_the_page_shows_what_the_command_prints(command, stands, printed):
    again = "python tests/support/console_page.py docs/cli.md writes the page anew"
    assert agree(stands, printed[command]), f"{again}: {printed[command]}"
    assert all(len(line) <= 80 for line in stands.splitlines() if line.startswith("───"))


def test_a_page_that_went_stale_is_found():
    stands = "MLP\nLinear 11.0 ± 2.7 undecided 1.70×\nNext: tab report x\n"
    assert agree(stands, "MLP\nLinear 12.5 ± 0.7 better 0.9×\nNext: tab report x\n")
    assert not agree(stands, stands.replace("Linear", "Local"))
    assert not agree(stands, stands + "Report: x\n")
    assert agree("MLP\n[…]\n", stands) and not agree("CNN\n[…]\n", stands)


def test_every_command_is_on_the_page():
    def paths(command, words):
        below = getattr(command, "commands", {})
        if not below or (command.invoke_without_command and words):
            yield words
        for name, inner in below.items():
            yield from paths(inner, (*words, name))

    typed = [line for body in blocks(PAGE, "sh") for line in body.splitlines()]
    shown = [command.split()[1:] for command in (*(command for command, _ in EXAMPLES), *typed)]
    for words in paths(typer.main.get_command(app), ()):
        options = [line for line in shown if tuple(line[: len(words)]) == words]
        assert options, f"docs/cli.md has no example of tab {' '.join(words)}"
