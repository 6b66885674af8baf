"""`tab bench compare`: what is wrong, gone or undecided is never "the same"; load is no change."""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from patience import PATIENCE, until
from scipy import stats
from tasks import alive, own_process
from typer.testing import CliRunner

from tab.bench.regress import OPEN, compare, welch
from tab.bench.results import load
from tab.bench.rows import Row, row_speedup, worst_of
from tab.bench.turns import busy, in_turns, merged
from tab.cli.bench import app

ENVIRONMENT = {"cpu": "Z80", "threads": 1, "isa": "AVX2", "torch": "2.14", "commit": "a"}


def row(contestant="tab", case="c", processes=3, rounds=4, slow=1.0, seed=0, load=0.0, noise=0.01):
    """A millisecond's kernel beside a yardstick of 2 ms. load: spread of what slows both alike,
    drawn for each process; noise: of the kernel alone, for each process."""
    generator, made = np.random.default_rng(seed), None
    for _ in range(processes):
        machine = math.exp(abs(generator.normal(0, load)))
        mine = 1e-3 * slow * machine * math.exp(generator.normal(0, noise))
        times = (mine * np.exp(generator.normal(0, 0.02, rounds))).tolist()
        pace = (2e-3 * machine * np.exp(generator.normal(0, 0.02, rounds))).tolist()
        new = Row(case, contestant, error=1e-7)
        new.timed("forward", times, pace)
        made = new if made is None else merged([made], [new])[0]
    return made


def verdict(old, new, **options):
    return compare([old] if old else [], [new] if new else [], **options)[0].verdict


def test_a_change_is_found_with_three_processes():
    """The rank test of three against three gives no p below 0.1: it could find nothing."""
    assert stats.mannwhitneyu([1, 2, 3], [4, 5, 6]).pvalue == pytest.approx(0.1)
    assert verdict(row(), row(slow=1.2, seed=1)) == "slower"
    assert verdict(row(), row(slow=0.8, seed=1)) == "faster"
    five = {"processes": 5}  # the default
    twelve = [row(case=f"c{i}", seed=i, **five) for i in range(12)]
    slow = [1.2 if i == 3 else 1.0 for i in range(12)]
    changed = [row(case=f"c{i}", seed=50 + i, slow=slow[i], **five) for i in range(12)]
    slower = [c.case for c in compare(twelve, changed) if c.verdict == "slower"]
    assert slower == ["c3"]  # Holm's correction over twelve leaves it


def test_same_is_said_only_of_what_was_excluded():
    quiet = {"noise": 0.001, "rounds": 200}
    assert verdict(row(**quiet), row(seed=1, **quiet)) == "same"
    assert verdict(row(**quiet), row(seed=1, slow=1.02, **quiet)) == "same"  # sure, but too small
    change = compare([row(noise=0.02)], [row(noise=0.02, seed=1)])[0]
    assert change.verdict == OPEN and (change.low < 0.95 or change.high > 1.05)
    assert verdict(row(noise=0.2), row(noise=0.2, seed=1)).startswith("undecidable: too noisy")


def test_load_on_the_machine_is_no_change():
    """Of 200 pairs of runs of one kernel, the second under a load that doubles times, hardly any
    differ; by times alone nearly each would."""
    alone = found = 0
    for i in range(200):
        old, new = row(seed=i), row(seed=1000 + i, load=0.7)
        found += compare([old], [new])[0].verdict in ("slower", "faster")
        logs = [[math.log(np.median(t)) for t, _ in r.by_process("forward")] for r in (old, new)]
        alone += np.mean(logs[1]) - np.mean(logs[0]) > math.log(1.05)
    assert found <= 4 and alone > 150


def test_where_the_machine_changed_more_than_the_kernel_nothing_is_decided():
    old, new = row(), row(seed=1, slow=1.2)
    new.seconds["forward"] = [3 * t for t in new.seconds["forward"]]
    new.pace["forward"] = [3 * t for t in new.pace["forward"]]
    assert verdict(old, new).startswith("undecidable: the machine itself took 3.0")


@pytest.mark.parametrize("processes", [1, 2])
def test_one_process_decides_nothing(processes):
    old = row(processes=processes, rounds=50)
    said = verdict(old, row(processes=1, rounds=50, slow=2.0))
    assert said == f"undecidable: {processes} and 1 processes, at least 2 each"


def test_files_of_before_have_one_process():
    old = Row("c", "tab", error=1e-7, seconds={"forward": [1.0] * 30})
    assert old.by_process("forward") == [([1.0] * 30, [])]
    change = compare([old], [row()])[0]
    assert change.undecidable and change.old == 1.0 and not change.bad


def spoiled(time):
    new = row()
    new.seconds["forward"][2] = time
    return new


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (Row("c", "tab", skipped="wrong: error 1e+00 of the largest value"), "wrong: error 1e+00"),
        (Row("c", "tab", skipped="TypeError: no"), "gone: TypeError: no"),
        (Row("c", "tab", seconds={"both": [1.0]}), "gone: this direction"),
        (row("tab cpp"), "gone: not in the new run"),
        (spoiled(math.nan), "failed: the new run holds times that are none"),
        (spoiled(0.0), "failed: the new run holds times that are none"),
    ],
)
def test_what_is_wrong_or_gone_is_named(new, said):
    found = compare([row()], [new])
    bad = [change for change in found if change.bad]
    assert len(bad) == 1 and bad[0].verdict.startswith(said) and bad[0].ours
    assert not any(change.verdict == "same" for change in found)


def test_what_is_new_is_no_fault_and_nothing_in_common_is_an_error():
    found = compare([row()], [row(seed=1), row("tab cpp")])
    assert [c.verdict.split(":")[0] for c in found] == [OPEN, "new"]
    assert not any(c.bad or c.undecidable for c in found)
    with pytest.raises(ValueError, match="in common"):
        compare([], [row()])


def test_welch_is_scipys():
    x, y = [0.1, 0.13, 0.08], [0.3, 0.36, 0.33, 0.31]
    moved, half, p = welch(x, y, 0.01)
    theirs = stats.ttest_ind(y, x, equal_var=False)
    interval = theirs.confidence_interval(0.99)
    assert p == pytest.approx(theirs.pvalue)
    assert (moved - half, moved + half) == pytest.approx((interval.low, interval.high))
    assert welch([0.0, 0.0], [0.0, 0.0], 0.01)[2] == 1.0  # without spread, not without an answer


# --- turns ----------------------------------------------------------------------------------------


def test_who_is_wrong_in_one_process_is_not_timed():
    bad = Row("c", "tab", error=1.0, skipped="wrong: error 1e+00")
    for pair in ([row()], [bad]), ([bad], [row()]):
        found = merged(*pair)[0]
        assert found.skipped.startswith("wrong") and not found.seconds and found.error == 1.0
    assert math.isnan(worst_of([1e-7, math.nan])) and worst_of([]) is None


def test_processes_take_turns():
    def one(unit):
        new = Row(unit, "tab")
        new.timed("forward", [1.0], [2.0])
        return [new]

    assert [i for i, _ in in_turns(["a", "b"], one, 1)] == [0, 1]
    *_, (_, rows) = in_turns([3], own_process, 2)
    assert len(set(rows[0].seconds["forward"])) == 2 and rows[0].rounds["forward"] == [1, 1]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_measurement_ends_with_its_caller(sent, tmp_path):
    """A caller that waits for it, or an orphan that waits for more, holds its memory for ever."""
    file = tmp_path / "process"
    code = f"import tasks, tab.bench.turns as t; t.fresh(tasks.held_up, {str(file)!r})"
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    caller = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **path})
    try:
        assert until(lambda: file.exists() or caller.poll() is not None)
        measuring = int(file.read_text())
        caller.send_signal(sent)
        caller.wait(PATIENCE)
        assert until(lambda: not alive(measuring))
    finally:
        caller.kill()


def test_rounds_pair_within_processes():
    """The slower one stopped earlier in the first process: its next round is the second's first."""
    fast = Row("c", "tab", seconds={"both": [1, 1, 1, 2, 2]}, rounds={"both": [3, 2]})
    slow = Row("c", "x", seconds={"both": [2, 2, 4, 4]}, rounds={"both": [2, 2]})
    assert row_speedup(slow, fast, "both") == (2.0, 2.0, 2.0)


def test_a_busy_machine_is_said():
    assert busy({"start": 0.1, "most": 1.2, "cores": 2}, threads=1) == ""
    assert "load average 3.5 before" in busy({"start": 3.5, "most": 4, "cores": 2}, threads=1)
    assert busy(None, 1) == ""


# --- command line ---------------------------------------------------------------------------------


def stored(path, rows, **environment):
    from dataclasses import asdict

    record = {"command": "", "environment": ENVIRONMENT | environment, "roofline": None}
    path.write_text(json.dumps(record | {"rows": [asdict(r) for r in rows]}))
    load(path)
    return str(path)


def told(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["compare", *arguments])


def test_exit_codes(tmp_path):
    old = stored(tmp_path / "old.json", [row(), row("eager")])
    new = stored(tmp_path / "new.json", [row(seed=1), row("eager", seed=2)], commit="b")
    done = told(old, new)
    assert done.exit_code == 0 and "commit: was a, now b" in done.output, done.output
    other = stored(tmp_path / "slow.json", [row(slow=1.3), row("eager")])
    assert told(old, other).exit_code == 1 and "slower" in told(old, other).output
    peer = stored(tmp_path / "peer.json", [row(seed=1)])  # another's kernel is named, no failure
    assert told(old, peer).exit_code == 0 and "gone" in told(old, peer).output
    assert told(peer, stored(tmp_path / "none.json", [row("eager")])).exit_code == 1
    assert told(old, stored(tmp_path / "one.json", [row(processes=1)])).exit_code == 2


@pytest.mark.parametrize("what", [{"cpu": "Z81"}, {"threads": 2}, {"gpu": "H100"}])
def test_two_machines_are_refused(what, tmp_path):
    old = stored(tmp_path / "old.json", [row()])
    new = stored(tmp_path / "new.json", [row(seed=1)], **what)
    done = told(old, new)
    assert isinstance(done.exception, ValueError) and "not of one machine" in str(done.exception)
    assert next(iter(what)) in str(done.exception) and "--force" in str(done.exception)
    assert told(old, new, "--force").exit_code == 0
