"""Every script of bench/ runs, at its smallest: what they need of TAB is still there."""

import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from forks import python
from paths import ROOT
from typer.testing import CliRunner

from tab.bench.cases import SIZES
from tab.cli.main import app
from tab.sweep.halving import BUDGETS, Budget
from tab.tasks.tasks import InProcess

BENCH = ROOT / "bench"
SMALLEST = {  # what it is run with, and what it then prints
    "busy": (
        "--turns 1 --hogs 1 --threads 1 --attention none --budget 0 --recipe quick",
        r"\| 1 \| \d",
    ),
    "features": ("--tokens 64 --rounds 2 --only linear --others without", r"\| linear \|"),
    "gpu_times": (
        "cpu {out}/times.json --ops linear,mla --sizes tiny",
        r"time linear/tiny/full/float32 tab both \d",
    ),
    "gpu_smoke": ("cpu", r"smoke .*performer cpp: "),
    "isas": (
        "{out} --isas avx2 --ops mla --budget 0 --threads 1 --processes 1",
        r"`mla` cifar \| expand \| \d",
    ),
    "kernel_speed": ("bench/results/epyc-zen4-2core {out}/x.png", r"\| `linear` vision \| \d"),
    "launches": ("--help", "usage: "),  # it compiles
    "overhead": (f"{ROOT} {ROOT} --turns 1 --only linear", r"linear, fwd \+ bwd +\d"),
    "packed": (
        "--sequences 2 --shortest 2 --longest 4 --heads 1 --width 8 --rounds 2 --only linear",
        r"\| linear.* \| packed \| \d",
    ),
    "record": (
        "--data shapes:100/60 --out {out} --epochs 2 --batch 25 --threads 1",
        r'"epoch": 2, "step": 8, .*"shifted": \d',
    ),
    "seeds": ("2 1 quick-mlp", r"quick +mlp +multi_head +\d"),
    "sweeps": ("shapes:100/20 1", r"2 Ray nodes +\d.* the same winners"),
    "verdicts": ("4 100", r"CNN +\d"),
}
ELSEWHERE = {
    "gpu_steps": "test_gpu_script.py",
    "images_per_second": "test_gpu_script.py",
    "feature_cases": "of features.py",
    "conftest": "of pytest",
}


def started(command, *, real=subprocess.run, **options):
    """subprocess.run: `python -m tab` is this process, another Python a fork of one that has
    PyTorch."""
    if command[0] != sys.executable:
        return real(command, **options)
    words = [word for word in command[1:] if word != "-P"]
    if words[:2] == ["-m", "tab"]:
        done = CliRunner().invoke(app, words[2:], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return None
    done = python(*words, environment=options["env"])
    assert not options.get("check") or done.returncode == 0, done.stderr
    return done


@pytest.fixture
def cheap(monkeypatch):
    """The Pythons that they start are no new ones; all is small, torch.compile writes no C++, and
    Ray is this process."""
    compiler = torch.compile
    monkeypatch.setattr(subprocess, "run", started)
    monkeypatch.setattr("torch.compile", lambda f, **o: compiler(f, backend="aot_eager", **o))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("tab.machine.keep_freed_memory", lambda: None)  # for ever
    monkeypatch.setattr("tab.tasks.processes.Processes", lambda *_: InProcess())
    monkeypatch.setitem(sys.modules, "ray.cluster_utils", SimpleNamespace(Cluster=Cluster))
    ray = SimpleNamespace(Ray=lambda address: InProcess())
    monkeypatch.setitem(sys.modules, "tab.tasks.ray_cluster", ray)
    monkeypatch.setitem(BUDGETS, "quick", Budget(1, (1,), 2.0, 80, 20))
    monkeypatch.setitem(SIZES, "cifar", SIZES["tiny"])


class Cluster:
    """None."""

    address = ""

    def __init__(self, **_):
        pass

    def add_node(self, **_):
        pass

    shutdown = add_node


@pytest.mark.usefixtures("cheap", "one_thread")
@pytest.mark.parametrize("name", SMALLEST)
def test_a_script_runs(name, tmp_path, monkeypatch, capsys):
    words, prints = SMALLEST[name]
    file = str(BENCH / f"{name}.py")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [file, *words.format(out=tmp_path).split()])
    monkeypatch.syspath_prepend(str(BENCH))
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
    said = capsys.readouterr().out
    assert re.search(prints, said), said


def test_none_is_left_out():
    names = {path.stem for path in BENCH.glob("*.py") if not path.stem.startswith("bench_")}
    assert names == {*SMALLEST, *ELSEWHERE}


def test_what_pytest_runs_is_collected():
    """Of `make bench`, which races for minutes."""
    assert "test_assembly" in dir_of("bench_batches")
    given, made = {"--ops": "linear", "--sizes": "tiny"}, []
    metafunc = SimpleNamespace(
        config=SimpleNamespace(getoption=given.get), parametrize=lambda _, cases: made.extend(cases)
    )
    dir_of("bench_kernels")["pytest_generate_tests"](metafunc)
    assert {"linear/tiny/full/float32-both-tab"} <= {case.id for case in made}


def dir_of(name: str) -> dict:
    return runpy.run_path(str(BENCH / f"{name}.py"))
