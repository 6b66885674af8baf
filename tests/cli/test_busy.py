"""A busy machine is told of; threads of a training sleep while they wait."""

import os
from types import SimpleNamespace

import pytest
from small_cli import SMALL, flat, tab

from tab import machine
from tab.cli.expected import say_time
from tab.cli.given import SPINS
from tab.train import estimate

TRAIN = ("train", "mlp", "none", *SMALL)


@pytest.mark.parametrize("load, told", [(99.0, True), (0.1, False), (None, False)])
def test_a_load_beyond_the_cores_is_said_once(load, told, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "load", lambda: load)
    done = tab(*TRAIN, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert flat(done.output).count("times will mean little") == told


def test_a_benchmark_says_so_once_before_and_once_after(monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: 99.0)
    words = "bench --ops linear --sizes tiny --contestants eager --budget 0.01 --processes 1"
    done = tab(*words.split())
    assert done.exit_code == 0, done.output
    said = flat(done.output)
    assert said.count("times will mean little") == said.count("the machine was not idle") == 1


@pytest.mark.parametrize(
    "given, spins",
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_wait_as_the_environment_says_else_soon_asleep(given, spins, monkeypatch, tmp_path):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    done = tab(*TRAIN, "--out", tmp_path / "run")
    assert done.exit_code == 0 and os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize(
    "jobs, threads, load, text",
    [
        (1, 2, 0.1, "about 2 min:"),
        (4, 1, 0.1, "about 50 s:"),  # four on two cores are as quick as two
        (4, 2, 0.1, "about 2 min:"),
        (2, 1, 0.1, "about 50 s:"),
        (1, 2, 9.0, "about 2 min while the machine is as busy as it is now:"),
    ],
)
def test_the_time_told_knows_cores_and_load(jobs, threads, load, text, monkeypatch, capsys):
    seconds = estimate.Estimate(100.0, 1, 1)
    monkeypatch.setattr(estimate, "estimate", lambda *args, **options: seconds)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(machine, "load", lambda: load)
    executor = SimpleNamespace(jobs=jobs, threads=threads)
    say_time([("config", 1.0)], None, "cpu", executor)
    assert f"It will take {text}" in flat(capsys.readouterr().out)
