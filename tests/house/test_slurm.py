"""SLURM's executor by submitit's local one: the same jobs, as processes of this machine."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT, SUPPORT
from patience import until
from tasks import (
    alive,
    count,
    count_and_be_preempted_at,
    count_and_die_at,
    facts,
    fail,
    has_torch,
    wait_forever,
)

from tab.tasks import slurm
from tab.tasks.choose import executor
from tab.tasks.slurm import FOLDER, Slurm, _parsed
from tab.tasks.tasks import Done, Shared, Task, run_tasks


@pytest.fixture(autouse=True)
def jobs_find_the_tasks(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, SUPPORT))))


def run(tasks: list[Task], **options) -> tuple[dict[int, Done], dict[int, list]]:
    events: dict[int, list] = {i: [] for i in range(len(tasks))}
    where = executor(slurm="local", **options)
    found = run_tasks(tasks, where, lambda i, event: events[i].append(event))
    return {done.index: done for done in found}, events


@pytest.mark.slow
def test_values_errors_events_and_deaths(tmp_path, caplog):
    """As of the other executors: an exception ends its own task; a job that dies, or is put back
    into the queue, goes on from its folder, and no event comes twice."""
    shared = Shared("x", os.getpid)
    tasks = [
        Task(count_and_die_at, ([2], 4, tmp_path / "0"), tmp_path / "0"),
        Task(count_and_be_preempted_at, (2, 4), tmp_path / "1"),
        Task(fail, ("no such luck",), tmp_path / "2"),
        Task(facts, (shared,), tmp_path / "3"),
        Task(has_torch, (), tmp_path / "4"),
    ]
    with caplog.at_level(logging.WARNING, "tab"):
        ends, events = run(tasks)
    assert ends[0].value == ends[1].value == 4
    assert events[0] == events[1] == [1, 2, 3, 4]
    assert type(ends[2].error) is ValueError and "in fail" in ends[2].traceback
    assert events[2] == ["before"]
    fact = ends[3].value
    assert fact["shared"] == fact["process"] != os.getpid() and fact["threads"] == 1
    assert ends[4].value is False  # a task that needs no torch waits for none
    assert caplog.text.count("it goes on") == 1 and "ended without a result" in caplog.text
    assert list((tmp_path / FOLDER).glob("*_log.err"))


def test_no_job_outlives_the_driver(tmp_path):
    started: list[int] = []

    def stop(index: int, process: int) -> None:
        started.append(process)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_tasks([Task(wait_forever, (), tmp_path / "0")], Slurm("local"), stop))
    assert started and until(lambda: not any(map(alive, started)))


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Iterator[Path]:
    """A cluster whose sbatch keeps what it is given."""
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {
        "sbatch": f'cp "${{@: -1}}" {tmp_path}/given.sh; echo Submitted batch job 7',
        "srun": "",
        "sacct": 'echo "JobID|State|NodeList"; echo "7|FAILED|one"',
        "scancel": "",
    }
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/bash\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    yield tmp_path / "given.sh"


def test_what_sbatch_is_asked_for(tmp_path, sbatch, monkeypatch):
    """And that a task whose jobs all die is given up, with the place of their logs."""
    monkeypatch.setattr(slurm, "ATTEMPTS", 1)
    where = executor(slurm="partition=gpu,timeout_min=90,mem_gb=8,account=lab", cpus=4, gpus=1)
    task = Task(count, (1,), tmp_path / "runs")
    (done,) = where.run([task], lambda index, event: None)
    assert f"its job 7 ended without a result (logs in {tmp_path / FOLDER})" in str(done.error)
    asked = sbatch.read_text()
    for line in ("partition=gpu", "time=90", "mem=8GB", "account=lab", "cpus-per-task=4"):
        assert f"#SBATCH --{line}\n" in asked
    assert "#SBATCH --gpus-per-node=1\n" in asked and str(tmp_path / FOLDER) in asked


def test_settings(sbatch):
    assert _parsed("a=1, b=x,c=0.5") == {"a": 1, "b": "x", "c": 0.5}
    assert Slurm("partition=gpu,at_once=8").at_once == 8
    wrong = {"gpu": "give local, or settings", "at_once=0": "at least 1"}
    wrong |= {"particion=gpu": "unknown 'particion'; did you mean 'partition'"}
    for text, says in wrong.items():
        with pytest.raises(ValueError, match=says):
            Slurm(text)
    with pytest.raises(ValueError, match="whole ones"):
        Slurm("local", gpus=0.5)
    with pytest.raises(ValueError, match="drop jobs"):
        executor(2, slurm="local")
    with pytest.raises(ValueError, match="one of the two"):
        executor(ray="local", slurm="local")


def test_a_machine_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no machine of a SLURM cluster"):
        Slurm("partition=gpu")


def test_without_submitit_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.delitem(sys.modules, "tab.tasks.slurm", raising=False)
    with pytest.raises(ImportError, match=r'pip install "transformer-attention-bench\[slurm\]"'):
        executor(slurm="local")
