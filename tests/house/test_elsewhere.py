"""Windows and macOS, as far as Linux can show it: no extensions, no /proc, none of Unix's modules.

The package alone, in a folder of its own, trains, compares, sweeps and reports on its references;
what is missing there is hidden from every process by a sitecustomize.py.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

HIDDEN = """
import builtins, io, os, signal, sys
def hide(real):
    def call(file, *args, **options):
        if str(file).startswith("/proc"):
            raise FileNotFoundError(2, "hidden", str(file))
        return real(file, *args, **options)
    return call
builtins.open = io.open = hide(io.open)
os.stat = hide(os.stat)
for name in ("fcntl", "resource", "tab._host"):  # the last is found through an editable install
    sys.modules[name] = None
del os.sched_getaffinity, os.getloadavg, signal.pthread_sigmask
class Psutil:  # as it answers on Windows
    Process = memory_info = lambda self=None: Psutil()
    peak_wset = 123 << 20
sys.modules["psutil"] = Psutil
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("else where")
    skipped = shutil.ignore_patterns("*.so", "__pycache__", "kernels", "left_out.json")
    shutil.copytree(ROOT / "tab", folder / "tab", ignore=skipped)
    shutil.copytree(ROOT / "kernels", folder / "tab/kernels")
    (folder / "sitecustomize.py").write_text(HIDDEN)
    return folder


def tab(place: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tab", *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(place), "TAB_DATA": "cache", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SMALL = [
    *("--recipe", "quick", "--data", "shapes:120/60", "--models", "mlp", "--device", "cpu"),
    *("--set", "data.validation=20", "--set", "train.batch_size=20"),
    *("--set", "model.mlp.hidden=8", "--set", "model.mlp.tokens=4"),
]


def test_doctor_says_what_is_not_built(place):
    assert "not built" in tab(place, "doctor")


def test_a_comparison_in_processes_and_its_report(place):
    words = ("--attentions", "none,linear,performer", "--epochs", "1", "--jobs", "2")
    tab(place, "compare", *SMALL, *words, "--out", "out")
    assert (place / "out/report.html").is_file()
    assert "performer" in (place / "out/experiment_results.csv").read_text(encoding="utf-8")
    assert tab(place, "report", "out")


def test_a_sweep(place):
    words = ["--attentions", "linear", "--space", "small", "--configurations", "2"]
    words += ["--epochs", "1", "--images", "0", "--validation", "20"]
    tab(place, "sweep", *SMALL, *words, "--out", "swept")
