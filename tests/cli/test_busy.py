"""A busy machine is told of; threads of a training sleep while they wait."""

import os

import pytest
from small_cli import SMALL, flat, tab

from tab import machine

TRAIN = ("train", "mlp", "none", *SMALL)


@pytest.mark.parametrize("load, told", [(99.0, True), (0.1, False), (None, False)])
def test_a_load_beyond_the_cores_is_said_once(load, told, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "load", lambda: load)
    done = tab(*TRAIN, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert flat(done.output).count("times will mean little") == told


@pytest.mark.parametrize("given, wanted", [(None, "passive"), ("active", "active")])
def test_threads_wait_as_the_environment_says_else_asleep(given, wanted, monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    done = tab(*TRAIN, "--out", tmp_path / "run")
    assert done.exit_code == 0 and os.environ["OMP_WAIT_POLICY"] == wanted
