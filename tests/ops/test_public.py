"""The public names: found by completion and type checkers, documented, and their examples run."""

import doctest
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tab

NAMES = [name for name in tab.__all__ if name != "functional"]  # which is a module


def test_dir_shows_every_public_name():
    """In a process of its own: here they are loaded already."""
    program = "import tab; print(*dir(tab))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
    )
    assert {*NAMES, "functional", "layers", "ops"} <= {*done.stdout.split()}
    assert {*tab.functional.__all__, "use_backend"} <= {*NAMES} & {*dir(tab.ops)}


def test_the_package_says_that_it_is_typed():
    assert (Path(tab.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("name", NAMES)
def test_examples(name, tmp_path, monkeypatch):
    """Each public name has one, and it prints what it says."""
    monkeypatch.chdir(tmp_path)
    finder = doctest.DocTestFinder(recurse=False)
    (found,) = finder.find(getattr(tab, name), name, globs={"torch": torch, "tab": tab})
    assert found.examples, f"{name} has no example"
    torch.manual_seed(0)
    results = doctest.DocTestRunner().run(found)
    assert results.failed == 0, f"{results.failed} of {results.attempted} differ, see above"
