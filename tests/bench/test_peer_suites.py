"""bench/peer_suites/run.py: what it counts as passed is what TAB answered."""

import runpy
import subprocess
import sys

from paths import ROOT

RUN = ROOT / "bench/peer_suites/run.py"
FOUND = {
    "tests/test_a.py::right": {"outcome": "passed", "calls": 2, "why": None},
    "tests/test_a.py::shape": {"outcome": "passed", "calls": 1, "why": None},
    "tests/test_a.py::config": {"outcome": "passed", "calls": 0, "why": None},
    "tests/test_a.py::wrong": {"outcome": "failed", "calls": 1, "why": "AssertionError: dq"},
    "tests/test_b.py::weights": {"outcome": "skipped", "calls": 1, "why": "TAB: no weights"},
    "tests/test_b.py::cuda": {"outcome": "skipped", "calls": 0, "why": "needs a GPU"},
    "tests/test_b.py::download": {"outcome": "failed", "calls": 0, "why": "OSError"},
}


def test_what_never_called_tab_is_no_success_of_it():
    table = runpy.run_path(str(RUN))["table"]
    broken = {
        n: dict(t, outcome="failed" if "right" in n else t["outcome"]) for n, t in FOUND.items()
    }
    *_, a, b = (line.split(" | ") for line in table(FOUND, broken).splitlines())
    assert a == ["| test_a", "4", "2", "1", "0", "1", "0", "0", "1 |"]
    assert b == ["| test_b", "3", "0", "0", "1", "0", "1", "1", "0 |"]


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    command = [sys.executable, RUN, "local-attention", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "is no checkout of local-attention" in done.stderr


def test_what_skips_for_tab_says_so_in_one_way():
    """run.py and swap.py each have the mark, since the first does without pytest and torch."""
    mark = 'OURS = "TAB: "'
    for file in (RUN, RUN.with_name("swap.py")):
        assert mark in file.read_text(encoding="utf-8")
