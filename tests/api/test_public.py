"""The public names: found by completion and type checkers, documented, and their examples run."""

import doctest
import inspect
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from forks import python

import tab
from tab.layers import _registry

NAMES = [name for name in tab.__all__ if name != "functional"]  # which is a module


def test_dir_shows_every_public_name():
    """In a process of its own: here they are loaded already."""
    program = "import tab; print(*dir(tab))"
    done = python("-W", "ignore", "-c", program)
    assert {*NAMES, "functional", "layers", "ops"} <= {*done.stdout.split()}
    lie = {*dir(tab.ops), *dir(tab.ops.decode)}
    assert {*tab.functional.__all__, "use_backend"} <= {*NAMES} & lie


def test_the_package_says_that_it_is_typed():
    assert (Path(tab.__file__).parent / "py.typed").exists()


def documented() -> list[str]:
    """What is called or built: of tab, of its operators, of its layers."""
    found = [name for name in NAMES if callable(getattr(tab, name))]
    for package in (tab.ops, tab.layers):
        where = package.__name__
        for name, value in vars(package).items():
            known = inspect.isroutine(value) or inspect.isclass(value)
            if known and name[0] != "_" and value.__module__.startswith(where):
                found.append(f"{where.removeprefix('tab.')}.{name}")
    return [name for name in found if name.removeprefix("ops.") == name or name[4:] not in found]


@pytest.mark.parametrize("name", documented())
def test_examples(name, tmp_path, monkeypatch):
    """Each public name has one, and it prints what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_registry, "_layers", dict(_registry._layers))
    finder = doctest.DocTestFinder(recurse=False)
    torch.manual_seed(0)
    given = {"torch": torch, "tab": tab, "x": torch.randn(2, 64, 32)}  # x: of the layers
    (found,) = finder.find(attrgetter(name)(tab), name, globs=given)
    assert found.examples, f"{name} has no example"
    results = doctest.DocTestRunner().run(found)
    assert results.failed == 0, f"{results.failed} of {results.attempted} differ, see above"
