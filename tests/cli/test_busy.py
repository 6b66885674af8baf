"""A busy machine is told of; threads of a training sleep while they wait."""

import os

import pytest
from small_cli import SMALL, flat, tab

from tab import machine
from tab.cli.given import SPINS

TRAIN = ("train", "mlp", "none", *SMALL)


@pytest.mark.parametrize("load, told", [(99.0, True), (0.1, False), (None, False)])
def test_a_load_beyond_the_cores_is_said_once(load, told, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "load", lambda: load)
    done = tab(*TRAIN, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert flat(done.output).count("times will mean little") == told


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
