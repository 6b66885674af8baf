"""What faults cost a sweep.

Each fault ends in a clear message; nothing that ended is trained again or counted twice, and the
winners are those of an unbroken sweep.

fault                                       shown by
a driver killed, at any moment              test_killed_drivers_*, kill_sweep.py (a hundred times)
what it left: RUNNING trials, a lock,       test_what_a_killed_driver_left_is_cleared
half a line of the journal
a process of --jobs killed, a Ray node      test_executor.py, test_ray.py
Control-C                                   test_sweep.py, test_postgresql.py
a full disk                                 test_a_full_disk_*; test_sweep.py: test_batches_*
a truncated checkpoint                      test_a_truncated_checkpoint_*
a damaged journal                           test_a_damaged_journal_*
a Ray node, within a rung                   test_ray.py: test_a_sweep_has_the_same_*
two drivers of one sweep                    test_two_drivers_*, test_postgresql.py
a loss that is not a number                 test_a_diverged_run_*
an exception in one configuration           test_an_exception_*
other data than it began with               test_other_data_*
no database                                 test_postgresql.py
"""

import errno
import os
import re
import shutil
import subprocess

import pytest

pytest.importorskip("optuna")

from kill_sweep import DATA, plan, result
from optuna.trial import TrialState
from small_sweep import SELF, Count, begin, kills, read, whole

import tab.sweep.driver
from tab import files
from tab.data.load import load_dataset
from tab.sweep.driver import records, sweep
from tab.sweep.halving import Budget
from tab.sweep.plan import SweepPlan
from tab.sweep.space import load_space

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset():
    return load_dataset(DATA)


@pytest.fixture(scope="module")
def done(tmp_path_factory, dataset):
    return whole(tmp_path_factory.mktemp("done"), dataset)


def test_killed_drivers_lose_and_double_nothing(tmp_path):
    """tests/support/kill_sweep.py does it a hundred times."""
    assert re.fullmatch(r"\(2, \d+, \[\]\)", found := kills(2, tmp_path)), found


def test_what_a_killed_driver_left_is_cleared(dataset, tmp_path):
    """A RUNNING trial, the journal's lock, and half a line at its end."""
    out = begin(tmp_path, dataset, attentions=["self"])
    it = SweepPlan.load(out)
    with records(it, out, mine=True) as found:
        entry = tab.sweep.driver.Entry(0, 0, 0, 0, 1, "", {"lr": 0.001, "hidden": 4})
        found[SELF].enqueue(entry)
        found[SELF].begin(entry)
    (out / "study.journal.lock").symlink_to("study.journal")
    with (out / "study.journal").open("a") as file:
        file.write('{"op_code": 4, "worker')
    sweep(it, dataset, out)
    trials = read(out)[SELF].study.trials
    assert (trials[0].state, trials[0].user_attrs["status"]) == (TrialState.FAIL, "lost")
    assert not {t.state for t in trials} & {TrialState.RUNNING, TrialState.WAITING}
    assert len(read(out)[SELF].ended()) == 5 + 2 + 1


def test_a_damaged_journal_is_named_and_can_be_made_anew(done, dataset, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "sweep")
    journal = out / "study.journal"
    journal.write_bytes(journal.read_bytes().replace(b'"op_code":4', b'"op_code:4', 1))
    with pytest.raises(ValueError, match=r"study\.journal is damaged"):
        sweep(SweepPlan.load(out), dataset, out)
    journal.unlink()
    sweep(SweepPlan.load(out), dataset, out)
    assert result(out) == result(done[0])


def test_a_diverged_run_is_counted_and_never_promoted(dataset, tmp_path):
    path = tmp_path / "wild.toml"
    path.write_text("[train]\nlr = [0.001, 0.003, 1e30]\n[model]\nhidden = [4]\n")
    changes = {"space": load_space(path), "budget": Budget(3, (1, 2), 1.1, 60, 20)}
    out = begin(tmp_path, dataset, attentions=["self"], **changes)
    sweep(SweepPlan.load(out), dataset, out)
    ended = read(out)[SELF].ended()
    wild = [n for (n, r), e in ended.items() if e.entry.params["lr"] == 1e30]
    assert [e.status for (n, r), e in ended.items() if n in wild] == ["diverged"]
    assert sum(r == 1 for n, r in ended) == 2
    assert ",diverged,," in (out / "trials.csv").read_text()


def test_an_exception_ends_its_configuration_and_is_not_tried_again(dataset, tmp_path, monkeypatch):
    calls = []

    def failing(config, dataset, epochs, device, *, folder, emit):
        calls.append(folder.name)
        if folder.name.endswith("c001"):
            raise RuntimeError("out of memory")
        return tab.sweep_train(config, dataset, epochs, device, folder=folder, emit=emit)

    monkeypatch.setattr(tab, "sweep_train", tab.sweep.driver.train_rung, raising=False)
    monkeypatch.setattr(tab.sweep.driver, "train_rung", failing)
    out = begin(tmp_path, dataset, attentions=["self"])
    for _ in range(2):
        sweep(SweepPlan.load(out), dataset, out)
        assert calls.count("mlp-self-c001") == 1 and len(calls) == 5 + 2 + 1
    end = read(out)[SELF].ended()[1, 0]
    assert (end.status, end.error) == ("failed", "RuntimeError: out of memory")
    assert "Traceback" in (out / "runs/mlp-self-c001/error.txt").read_text()


def test_a_truncated_checkpoint_costs_its_own_run_its_epochs(done, dataset, tmp_path):
    out = begin(tmp_path, dataset)

    class Stop(Count):
        def step(self, bracket, rung, entries):
            if rung == 1 and entries:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(SweepPlan.load(out), dataset, out, watcher=Stop())
    with records(SweepPlan.load(out), out) as found:
        waiting = found[SELF].study.get_trials(states=(TrialState.WAITING,))
    path = out / waiting[0].user_attrs["parent"]
    path.write_bytes(path.read_bytes()[:-100])
    watcher = Count()
    with pytest.warns(UserWarning, match="starts again"):
        sweep(SweepPlan.load(out), dataset, out, watcher=watcher)
    assert result(out) == result(done[0])
    assert watcher.epochs == 2 * (2 * 1 + 1 * 2) + 1


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounts a small tmpfs")
def test_a_full_disk_stops_the_sweep_which_goes_on_with_room(done, dataset, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs here")
    try:
        out = begin(place, dataset)
        with pytest.raises(OSError) as caught:
            sweep(SweepPlan.load(out), dataset, out)
        assert caught.value.errno == errno.ENOSPC
        subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
        sweep(SweepPlan.load(out), dataset, out)
        assert result(out) == result(done[0])
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_two_drivers_do_not_share_a_sweep(done, dataset):
    out, _ = done
    with files.locked(out), pytest.raises(ValueError, match="in use by process"):
        sweep(SweepPlan.load(out), dataset, out)


def test_other_data_is_refused_before_anything_fails_of_it(dataset, tmp_path):
    out = begin(tmp_path, dataset, attentions=["self"])
    with pytest.raises(ValueError, match=r"was made with shapes:100/20 .* give the same data"):
        sweep(SweepPlan.load(out), load_dataset("shapes:110/20"), out)
    assert not (out / "study.journal").exists()


def test_a_directory_of_something_else(done, dataset, tmp_path):
    with pytest.raises(ValueError, match="already holds a sweep"):
        plan(tmp_path).save(done[0], dataset)
    with pytest.raises(ValueError, match=r"no sweep\.toml"):
        SweepPlan.load(tmp_path)
    it = plan(tmp_path, budget=Budget(2, (1,), 2, 60, 500))
    with pytest.raises(ValueError, match="500"):
        it.save(tmp_path / "new", dataset)
    assert not (tmp_path / "new").exists()
