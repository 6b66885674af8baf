"""A plugin for pytest that every adapter loads: it counts how often a test reaches TAB, and writes
what became of each test to $TAB_PEER_OUT.

`TAB_PEER_BROKEN=1` makes every adapter answer 5 % too much. A test that still passes proves nothing
of TAB's numbers, and run.py says how many do.
"""

import functools
import json
import os
from collections.abc import Callable
from typing import NoReturn

import pytest
import torch

OURS = "TAB: "  # before the reasons that adapters give, beside those of the suite itself
BROKEN = os.environ.get("TAB_PEER_BROKEN") == "1"
calls = 0
found: dict[str, dict] = {}


def ours(adapter: Callable) -> Callable:
    """Marks a function that answers by TAB, in place of the peer's."""

    @functools.wraps(adapter)
    def answer(*args, **kwargs):
        global calls
        calls += 1
        out = adapter(*args, **kwargs)
        if not BROKEN:
            return out
        return out * 1.05 if isinstance(out, torch.Tensor) else (out[0] * 1.05, *out[1:])

    return answer


def not_applicable(why: str) -> NoReturn:
    """Ends a test that asks for something that TAB does not have."""
    pytest.skip(OURS + why)


def pytest_runtest_setup(item):
    global calls
    calls = 0


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        why = report.longrepr
        if isinstance(why, tuple):  # of a skip: file, line, reason
            why = why[2].removeprefix("Skipped: ")
        elif why is not None:
            crash = getattr(why, "reprcrash", None)
            why = str(why if crash is None else crash.message).splitlines()[0]
        found[report.nodeid] = {"outcome": report.outcome, "calls": calls, "why": why}


def pytest_sessionfinish():
    if out := os.environ.get("TAB_PEER_OUT"):
        with open(out, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
