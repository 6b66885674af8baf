"""The executors on this machine: same results, and what a death of either side costs."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from paths import SUPPORT
from patience import PATIENCE, until
from tasks import alive, count, count_and_die_at, facts, fail, has_torch

from tab.study.given import device_of, executor_for
from tab.tasks.choose import executor
from tab.tasks.processes import Processes
from tab.tasks.tasks import ATTEMPTS, InProcess, Shared, Task, run_tasks


def counts(folder: Path, number: int, steps: int = 3) -> list[Task]:
    return [Task(count, (steps,), folder / str(i)) for i in range(number)]


@pytest.mark.parametrize("where", [InProcess(), Processes(2, 1)], ids=["here", "processes"])
def test_values_errors_and_events(where, tmp_path):
    """An exception ends its own task only, and comes back with its traceback."""
    tasks = counts(tmp_path, 3)
    tasks[1] = Task(fail, ("no such luck",), tmp_path / "1")
    events = {0: [], 1: [], 2: []}
    ends = {d.index: d for d in run_tasks(tasks, where, lambda i, event: events[i].append(event))}
    assert events == {0: [1, 2, 3], 1: ["before"], 2: [1, 2, 3]}
    assert {index: end.value for index, end in ends.items()} == {0: 3, 1: None, 2: 3}
    assert type(ends[1].error) is ValueError and str(ends[1].error) == "no such luck"
    assert "in fail" in ends[1].traceback


def test_each_process_has_its_threads_and_loads_what_is_shared_once(tmp_path):
    shared = Shared("x", os.getpid)  # the "large value" tells who loaded it
    shared.put(os.getpid())
    tasks = [Task(facts, (shared,), tmp_path / str(i)) for i in range(3)]
    here = [done.value for done in run_tasks(tasks)]
    assert {fact["shared"] for fact in here} == {os.getpid()}
    for fact in (done.value for done in run_tasks(tasks, Processes(2, 3))):
        assert fact["shared"] == fact["process"] != os.getpid()
        assert fact["threads"] == 3 and fact["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"] != "3"


def test_a_process_imports_torch_only_for_a_task_that_needs_it(tmp_path):
    (done,) = run_tasks([Task(has_torch, (), tmp_path)], Processes(1, 1))
    assert done.value is False, done.traceback


def test_a_killed_process_is_replaced_and_its_task_goes_on(tmp_path, caplog):
    """And in the end given up, if it always kills its process."""
    once, always = tmp_path / "once", tmp_path / "always"
    tasks = [
        Task(count_and_die_at, ([2], 4, once), once),
        Task(count_and_die_at, (range(99), 99, always), always),
        *counts(tmp_path, 1),
    ]
    events = []
    with caplog.at_level(logging.WARNING, "tab"):
        ends = run_tasks(tasks, Processes(2, 1), lambda index, e: events.append((index, e)))
        ends = {end.index: end for end in ends}
    assert (ends[0].value, ends[2].value) == (4, 3)
    assert [event for index, event in events if index == 0] == [1, 2, 3, 4]  # none twice
    assert "SIGKILL" in str(ends[1].error) and f"{ATTEMPTS} times" in str(ends[1].error)
    assert (always / "count").read_text() == str(ATTEMPTS)
    assert caplog.text.count("it goes on") == 1 + ATTEMPTS - 1


def test_control_c_here_ends_all_tasks(tmp_path):
    def stop(index, event):
        raise KeyboardInterrupt

    for where in (InProcess(), Processes(2, 1)):
        with pytest.raises(KeyboardInterrupt):
            list(run_tasks(counts(tmp_path, 3, steps=10**9), where, stop))


DRIVER = """
from pathlib import Path
from tasks import wait_forever
from tab.tasks.processes import Processes
from tab.tasks.tasks import Task, run_tasks
tasks = [Task(wait_forever, (), Path(f"{i}")) for i in range(3)]
if __name__ == "__main__":
    list(run_tasks(tasks, Processes(2, 1), lambda index, event: print(event, flush=True)))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_driver(how, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(SUPPORT)}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children = [int(driver.stdout.readline()) for _ in range(2)]
    assert all(alive(child) for child in children)
    if how == signal.SIGINT:
        os.killpg(driver.pid, how)  # as a terminal does: the children get it too
    else:
        driver.send_signal(how)
    said = driver.communicate(timeout=PATIENCE)[1]
    assert driver.returncode == -how
    assert said.count("Traceback") == (how == signal.SIGINT)  # the driver's own
    assert until(lambda: not any(alive(child) for child in children))


def test_what_the_options_ask_for():
    assert isinstance(executor(), InProcess)
    assert executor(2, threads=3).threads == 3
    assert executor(10**6).threads == 1
    assert device_of("cuda", cluster="auto") == "cuda"  # though there may be none here
    for wrong in ({"jobs": 0}, {"jobs": 2, "threads": 0}, {"jobs": 2, "ray": "local"}):
        with pytest.raises(ValueError, match="jobs"):
            executor(**wrong)


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "tab.tasks.ray_cluster", raising=False)
    with pytest.raises(ImportError, match=r'pip install "transformer-attention-bench\[ray\]"'):
        executor(ray="local")


def test_ray_chooses_the_gpu():
    with pytest.raises(ValueError, match="--device cuda"):
        executor_for("cuda:1", 1, None, "auto", None, None, None)
