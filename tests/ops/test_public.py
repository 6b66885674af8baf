"""The public names: found by completion and type checkers, documented, and their examples run."""

import doctest
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tab

NAMES = [*tab.functional.__all__, "use_backend"]


def test_dir_shows_every_public_name():
    """In a process of its own: here they are loaded already."""
    program = "import tab; print(*dir(tab))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
    )
    assert {*NAMES, "functional", "layers", "load_model", "ops"} <= {*done.stdout.split()}
    assert all(hasattr(tab.ops, name) for name in NAMES)


def test_the_package_says_that_it_is_typed():
    assert (Path(tab.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    """Each public name has one, and it prints what it says."""
    finder = doctest.DocTestFinder(recurse=False)
    (found,) = finder.find(getattr(tab, name), name, globs={"torch": torch, "tab": tab})
    assert found.examples, f"{name} has no example"
    torch.manual_seed(0)
    results = doctest.DocTestRunner().run(found)
    assert results.failed == 0, f"{results.failed} of {results.attempted} differ, see above"
