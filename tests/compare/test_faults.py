"""What a comparison survives. Each fault ends in a clear message; what was finished is not run
again, and after --resume both CSV files are those of an unbroken comparison, but for the times.

fault                                      shown by
a driver killed, at any moment             test_a_killed_driver_leaves_no_orphan_and_resumes,
                                           test_compare.py
a process of --jobs killed                 test_jobs_and_a_killed_process_…, test_executor.py
a worker or a node of Ray killed           test_ray.py
Control-C                                  test_control_c_ends_cleanly_and_resumes, test_cli.py
a full disk                                test_a_full_disk_*
a directory that cannot be written         test_an_unwritable_directory_is_named
a truncated or altered checkpoint          test_train.py
two drivers in one directory               test_compare.py
a loss that is not a number                test_train.py, test_compare.py
altered, missing or truncated data         test_data.py; changed since: test_data_that_changed
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE, until
from small_grid import GRID, begin, finished, resume, same
from tasks import alive, children
from typer.testing import CliRunner

from tab.cli.main import app
from tab.compare.driver import Watcher, compare
from tab.compare.plan import Plan
from tab.data.load import load_dataset, loader
from tab.tasks.processes import Processes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset():
    return load_dataset(GRID.data)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, dataset):
    """In this process."""
    out = begin(tmp_path_factory.mktemp("faults") / "unbroken", dataset)
    resume(out, dataset)
    return out


def start(out: Path) -> subprocess.Popen:
    """`tab compare --resume out --jobs 2`, in a process group of its own, as in a terminal."""
    words = ["compare", "--resume", str(out), "--jobs", "2", "--threads", "1"]
    return subprocess.Popen(
        [sys.executable, "-m", "tab", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def in_the_middle(driver: subprocess.Popen, out: Path) -> list[int]:
    """Waits until a run has an epoch on disk, but the last; the driver's processes."""
    files = out / "runs"
    assert until(lambda: list(files.glob("*/checkpoint.pt")) or driver.poll() is not None)
    assert driver.poll() is None, "too late: it had ended"
    return children(driver.pid)


def ended(driver: subprocess.Popen, code: int) -> str:
    """What it said; it must end so."""
    out, err = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == code, out + err
    return out + err


def test_a_killed_driver_leaves_no_orphan_and_resumes(unbroken, dataset, tmp_path):
    out = begin(tmp_path / "killed", dataset)
    driver = start(out)
    workers = in_the_middle(driver, out)
    driver.kill()
    ended(driver, -signal.SIGKILL)
    assert workers and until(lambda: not any(alive(worker) for worker in workers))
    before = finished(out)
    resume(out, dataset)  # in one process now
    same(out, unbroken, before)


def test_jobs_and_a_killed_process_change_nothing_bit_for_bit(unbroken, dataset, tmp_path):
    out, killed, epochs = begin(tmp_path / "killed", dataset), [], []

    class Kill(Watcher):
        def epoch(self, config, row):
            epochs.append((config.id, row["epoch"]))
            if not killed:
                killed.append(children(os.getpid())[0])
                os.kill(killed[0], signal.SIGKILL)

    compare(Plan.load(out), dataset, out, watcher=Kill(), executor=Processes(2, 1))
    assert killed and len(epochs) == len(set(epochs))  # none twice
    same(out, unbroken, {})


def test_control_c_ends_cleanly_and_resumes(unbroken, dataset, tmp_path):
    out = begin(tmp_path / "stopped", dataset)
    driver = start(out)
    workers = in_the_middle(driver, out)
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: every process of the group
    said = ended(driver, 130)
    assert f"go on with: tab compare --resume {out}" in said and "Traceback" not in said
    assert workers and not any(alive(worker) for worker in workers)
    before = finished(out)
    resume(out, dataset)
    same(out, unbroken, before)


@pytest.mark.parametrize(  # the summary is the driver's, whoever trains
    ("file", "jobs"),
    [
        ("runs/mlp-linear-s0/checkpoint.pt", 1),
        ("runs/mlp-linear-s0/checkpoint.pt", 2),
        ("experiment_summary.csv", 1),
    ],
)
def test_a_full_disk_in_the_middle(file, jobs, unbroken, dataset, tmp_path):
    """The kernel's own ENOSPC: what would be written aside goes to /dev/full."""
    out = tmp_path / "full"
    shutil.copytree(unbroken, out)
    shutil.rmtree(out / "runs" / "mlp-linear-s0")
    aside = out / (f"{file}.part" if file.endswith(".pt") else f"{file}.{os.getpid()}.part")
    aside.parent.mkdir(exist_ok=True)
    aside.symlink_to("/dev/full")
    before = finished(out)
    said = CliRunner().invoke(app, ["compare", "--resume", str(out), "--jobs", str(jobs)])
    assert said.exit_code == 2 and "Traceback" not in said.stderr
    assert "No space left on device" in said.stderr and str(out / file) in said.stderr
    assert f"go on with: tab compare --resume {out}" in said.stderr
    resume(out, dataset)
    same(out, unbroken, before)


def test_a_full_disk_for_real(unbroken, dataset, tmp_path):
    """A file system too small for the runs, then made larger."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        out = begin(tmp_path / "grid", dataset)
        with pytest.raises(OSError, match="No space left on device"):
            resume(out, dataset)
        before = finished(out)
        subprocess.run(["mount", "-o", "remount,size=8m", str(tmp_path)], check=True)
        resume(out, dataset)
        same(out, unbroken, before)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_an_unwritable_directory_is_named(dataset, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=str(tmp_path / "file" / "out")):
        begin(tmp_path / "file" / "out", dataset)


def test_data_that_changed(dataset):
    """A process that finds other data than the driver had does not train on it."""
    load = loader(dataset, "shapes:100/30")
    with pytest.raises(ValueError, match="no longer the data set"):
        load()
