"""Which times other work decided, with one seed too; and what an epoch keeps to tell it."""

import csv
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from small_report import FACTS, run

from tab.api.comparison import STARRED
from tab.api.rows import Rows
from tab.cli.tables import ranked_rows, ranked_table
from tab.compare.csv_files import write_csvs
from tab.compare.disturbance import disturbed, slowdown
from tab.compare.plan import Grid
from tab.machine import Stopwatch
from tab.report import markdown
from tab.report.chart_data import charts, tradeoff_group
from tab.report.forest import rows
from tab.report.pictures import far_apart
from tab.report.tables import ranking

EVEN = ([10.0] * 4, None, None)


def timed(seconds, waited=None, cpu=None, attention="local", **fields):
    """A run whose epochs took these seconds."""
    more = {"waited_seconds": waited, "cpu_seconds": cpu}
    epochs = [
        {**run().rows[0], "epoch": i + 1, "seconds": s}
        | {"cumulative_training_time": sum(seconds[: i + 1])}
        | {key: values[i] for key, values in more.items() if values is not None}
        for i, s in enumerate(seconds)
    ]
    return replace(run(attention, seconds=sum(seconds)), rows=epochs, **fields)


def test_a_run_is_held_against_what_it_would_have_taken_alone():
    assert slowdown(timed([20.0, 20.0], waited=[10.0, 12.0])) == pytest.approx(40 / 18)
    # The kernel's account comes before the pace, which a first epoch with a compiler in it spoils.
    assert slowdown(timed([30.0, 10.0, 10.0], waited=[0.0, 0.0, 0.0])) == 1
    # Where it keeps none: processor time, if one thread has it all.
    assert slowdown(timed([20.0, 20.0], cpu=[10.0, 10.0])) == 2
    assert slowdown(timed([20.0, 20.0], cpu=[10.0, 10.0], threads=2)) == 1
    # Results of before: the study's KV compression, and a run that nobody disturbed.
    assert slowdown(timed([1488.1, 305.1, 97.5, 46.9])) == pytest.approx(10.33, rel=1e-3)
    assert slowdown(timed([31.9, 32.8, 32.7, 32.3])) < 1.02
    assert slowdown(timed([10.0])) is None and slowdown(timed([])) is None


def test_on_a_gpu_the_first_epoch_compiles_and_a_core_is_not_what_it_waits_for():
    assert slowdown(timed([60.0, 10.0, 10.0], device="NVIDIA H200")) == 1
    assert slowdown(timed([10.0, 10.0, 30.0], [0.0] * 3, device="NVIDIA H200")) == 2
    assert slowdown(timed([60.0, 10.0], device="NVIDIA H200")) is None


def test_half_an_account_is_none():
    """A run that began under an earlier version and went on under this one."""
    half = timed([10.0, 10.0, 40.0], waited=[None, 0.0, 0.0], cpu=[None, 9.0, 9.0])
    assert slowdown(half) == 2


def test_one_seed_is_marked_everywhere(tmp_path):
    runs = [timed(*EVEN, "none"), timed(*EVEN), timed([100.0, 40.0, 10.0, 10.0], attention="self")]
    assert [disturbed([r]) for r in runs] == [False, False, True]
    assert disturbed([timed([10.0])]) is None
    entries = ranking(runs, "cnn")
    assert {row.key: row.disturbed for row in rows(entries)} == {"local": False, "self": True}

    write_csvs(tmp_path, runs)
    text = (tmp_path / "experiment_summary.csv").read_text()
    found = {x["attention_type"]: x for x in csv.DictReader(io.StringIO(text))}
    assert found["self"]["time_disturbed"] == "True" and found["self"]["slowdown"] == "4.0"
    assert (found["local"]["time_disturbed"], found["local"]["slowdown"]) == ("False", "1.0")
    assert found["self"]["time_spread"] == ""
    assert {row["attention"]: row["time_disturbed"] for row in ranked_rows(entries)} == {
        **{"none": None, "local": False, "self": True}
    }
    screen = Console(file=io.StringIO(), width=80)
    screen.print(ranked_table(entries, "CNN"))
    assert (
        "4.00×*" in screen.file.getvalue()
        and "*: disturbed by other work" in screen.file.getvalue()
    )

    shown = Rows(ranked_rows(entries), {"title": "", "time_ratio": ""}, starred=STARRED)
    assert "4 *" in repr(shown) and "<td>4 *</td>" in shown._repr_html_()

    grid = Grid("fair", ["cnn"], ["none", "local", "self"], 1, "shapes", "cpu")
    said = markdown.report(runs, FACTS, grid, {})
    assert "| 4.00 \\* |" in said and "| 1.00 |" in said and "| 160 \\* |" in said
    assert "without waiting for a core" in said and "Here: Self-Attention." in said
    assert "1.00× the control's time (Local); that leaves out Self-Attention" in said

    costs = tradeoff_group(runs, {})
    points = {point["key"]: point["disturbed"] for point in costs.charts[0]["points"]}
    assert points == {"none": False, "local": False, "self": True}
    assert "A star marks a time" in costs.note
    assert "A star" not in tradeoff_group(runs[:2], {}).note
    (curve,) = [c for c in charts(runs, runs, "test", {}) if "against time" in c["title"]]
    assert not curve["xlog"] and far_apart([100.0, 130.0, 1937.0]) and not far_apart([])
    assert [s.get("look") for s in curve["series"]] == [None, None, {"name": "Self-Attention *"}]


def test_a_disturbed_control_disturbs_every_ratio():
    runs = [timed([50.0, 10.0], attention="none"), timed([10.0, 10.0])]
    assert rows(ranking(runs, "cnn"))[0].disturbed
    said = markdown.summary("cnn", ranking(runs, "cnn"))
    assert "No time ratio can be told: Local, as other work decided the times." in said


# --- the watch ------------------------------------------------------------------------------------


def computing(seconds: float) -> None:
    """Until this process has had so much of a core."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_sleep_takes_no_core_and_waits_for_none():
    """Two clocks: they may differ by what one of them is set right by, and in their last digits."""
    with Stopwatch() as slept:
        time.sleep(0.05)
    assert slept.seconds > 0.049 > slept.cpu
    with Stopwatch() as computed:
        computing(0.05)
    assert computed.seconds > 0.999 * computed.cpu > 0.049


def test_processor_time_lies_within_the_time_on_the_clock(monkeypatch):
    """However long each clock takes to read: here twice as long as the one before."""
    times = (2.0**i for i in range(4))
    clocks = dict.fromkeys(("perf_counter", "process_time"), times.__next__)
    monkeypatch.setattr("tab.machine.time", SimpleNamespace(**clocks))
    with Stopwatch() as time_:
        pass
    assert (time_.cpu, time_.seconds) == (4 - 2, 8 - 1)


linux = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="Linux keeps account")


@linux
def test_who_shares_a_core_waits_for_it():
    alone = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(alone)})
    code = "import sys; print(1, flush=True)\nwhile True: pass"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with Stopwatch() as time_:
            computing(0.3)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
        os.sched_setaffinity(0, alone)
    assert 0.1 < time_.waited < time_.seconds and time_.cpu >= 0.3


def test_where_no_account_is_kept_none_is_given(monkeypatch):
    monkeypatch.setattr("tab.machine._waits", dict)
    with Stopwatch() as time_:
        pass
    assert time_.waited is None


def test_training_keeps_both_for_each_epoch(tmp_path):
    import small_grid

    from tab.data.load import load_dataset

    dataset = load_dataset("shapes:100/20")
    out = small_grid.begin(tmp_path / "out", dataset)
    small_grid.resume(out, dataset)
    for path in out.glob("runs/*"):
        for line in (path / "rows.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert row["cpu_seconds"] > 0
            waited = row["waited_seconds"]
            assert waited is None or 0 <= waited <= row["seconds"]
        assert "load_at_start" in json.loads((path / "run.json").read_text())["environment"]
