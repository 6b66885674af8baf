"""Windows and macOS, as far as Linux can show it: no extensions, no /proc, none of Unix's modules.

The package alone, in a folder of its own, trains, compares, sweeps and reports on its references;
what is missing there is hidden from every process by a sitecustomize.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from patience import PATIENCE

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
    skipped = shutil.ignore_patterns("*.so", "kernels", "left_out.json")
    shutil.copytree(ROOT / "tab", folder / "tab", ignore=skipped)
    shutil.copytree(ROOT / "kernels", folder / "tab/kernels")
    (folder / "sitecustomize.py").write_text(HIDDEN)
    return folder


SMALL = [
    *("--recipe", "quick", "--data", "shapes:120/60", "--models", "mlp", "--device", "cpu"),
    *("--set", "data.validation=20", "--set", "train.batch_size=20"),
    *("--set", "model.mlp.hidden=8", "--set", "model.mlp.tokens=4", "--epochs", "1"),
]
COMPARED = "--attentions none,linear,performer --jobs 1 --threads 1 --out out"  # in a process
SWEPT = "--attentions linear --space small --configurations 2 --images 0 --out swept"
COMMANDS = {
    "doctor": ["doctor"],
    "compare": ["compare", *SMALL, *COMPARED.split()],
    "report": ["report", "out"],
    "sweep": ["sweep", *SMALL, *SWEPT.split(), "--validation", "20"],
}
# One after the other in one process: each would load PyTorch anew.
PROGRAM = """
import contextlib, io, json, sys
from tab.cli.main import main
said = {}
for name, words in json.loads(sys.argv[1]).items():
    sys.argv = ["tab", *words]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = main()
        except SystemExit as end:
            code = end.code
    said[name] = code, out.getvalue()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(place) -> dict[str, str]:
    """By each command."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(COMMANDS)],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(place), "TAB_DATA": "cache", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not [name for name, (code, _) in found.items() if code], done.stderr
    return {name: text for name, (_, text) in found.items()}


def test_doctor_says_what_is_not_built(said):
    assert "not built" in said["doctor"]


def test_a_comparison_in_processes_and_its_report(said, place):
    assert (place / "out/report.html").is_file()
    assert "performer" in (place / "out/experiment_results.csv").read_text(encoding="utf-8")
    assert said["report"]


def test_a_sweep(said, place):
    assert "Next: tab compare --recipe=" in said["sweep"]
    assert list((place / "swept/runs").iterdir())
