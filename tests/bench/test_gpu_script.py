"""bench/gpu.sh: whole on a CPU, each step at its smallest; its limits by clocks of the tests."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from paths import ROOT
from patience import PATIENCE, until

sys.path.insert(0, str(ROOT / "bench"))
import gpu_steps
from gpu_steps import TOTAL, Step, perform, steps
from images_per_second import rates, table


def plan(out: Path, **options) -> list[Step]:
    known = {"dry": False, "data": "shapes:100/20", "assemblers": {"bundled": "", "wheel": "/p"}}
    return steps(out, **known | options)


@pytest.fixture
def out(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path


def script(out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", ROOT / "bench" / "gpu.sh", out]
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_dry_the_script_runs_whole_on_a_cpu(out):
    done = script(out, DRY="1")
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
    for name in ("machine", "smoke", "tests", "times", "bench", "study"):
        assert re.search(rf"^{name}: ok, ", said, re.M), said
    assert re.search(r"^sanitizer: nothing to do", said, re.M)
    assert re.search(r"^smoke dry performer cpp: ", said, re.M)
    assert re.search(r"^MLP +linear +[\d,]+ images/s", said, re.M)
    with tarfile.open(out / "all.tgz") as tar:
        names = set(tar.getnames())
    assert {"bench.json", "times.json", "summary.txt", "work/smoke.log"} <= names
    assert "work/study/report.md" in names
    assert sum(path.is_file() for path in out.iterdir()) <= 8


def test_no_step_takes_what_is_reserved_for_the_later_ones(out, monkeypatch):
    """Every step takes all that it is given, by a clock of the test's, and the whole still fits."""
    monkeypatch.setattr(gpu_steps, "missing", lambda modules: [])
    monkeypatch.setattr(gpu_steps, "carried", lambda: False)
    now, given = [0.0], {}

    def greedy(step, seconds, log):
        given[step.name] = seconds
        now[0] += seconds
        return "CUT, out of time"

    told = perform(plan(out), out, run=greedy, clock=lambda: now[0])
    assert now[0] <= TOTAL and min(given.values()) >= 15
    assert list(given) == [
        "machine",
        "build",
        "smoke",
        "tests",
        "times",
        "bench",
        "study",
        "sanitizer",
    ]
    assert [what for _, what, _ in told] == ["CUT, out of time"] * 8
    with tarfile.open(out / "all.tgz") as tar:
        assert tar.getnames() == ["summary.txt"]


def test_what_is_left_over_goes_to_the_next(out, monkeypatch):
    monkeypatch.setattr(gpu_steps, "missing", lambda modules: [])
    monkeypatch.setattr(gpu_steps, "carried", lambda: False)
    given = {}

    def quick(step, seconds, log):
        given[step.name] = seconds
        return "ok"

    perform(plan(out), out, run=quick, clock=lambda: 0.0)
    assert given["bench"] == 170 and given["tests"] == 150 and given["study"] == 100


def test_a_step_without_its_modules_is_left_out_by_name(out):
    step = Step("study", 9, [["true"]], needs=("tomllib", "no_such_module"))
    ((_, what, _),) = perform([step], out, run=lambda *_: "ok")
    assert what.startswith("left out: no no_such_module here; WHEELS=")


class Begun(subprocess.Popen):
    """A process that has said something: what hangs does so before its time is up."""

    def __init__(self, command, **options):
        super().__init__(command, **options)
        if "hangs" in command[-1]:
            assert until(Path(options["stdout"].name).read_text)


def test_what_fails_and_what_hangs_costs_only_itself(out, monkeypatch):
    known = SimpleNamespace(**vars(subprocess) | {"Popen": Begun})
    monkeypatch.setattr(gpu_steps, "subprocess", known)
    hangs = "import time; print('it hangs', flush=True); time.sleep(600)"
    todo = [
        Step("none", PATIENCE, [["no-such-command"]]),
        Step("fails", PATIENCE, [[sys.executable, "-c", "print('E  wrong'); raise SystemExit(3)"]]),
        Step("hangs", 1, [[sys.executable, "-S", "-c", hangs]]),
        Step("both", PATIENCE, [["true"], ["false"]], variables=({"A": "1"}, {"A": "2"})),
        Step("last", PATIENCE, [["true"]]),
    ]
    told = {name: what for name, what, _ in perform(todo, out, total=PATIENCE)}
    assert told["none"].startswith("FAILED (No such file") and told["last"] == "ok"
    assert told["fails"] == "FAILED (3)" and told["both"] == "FAILED (1)"
    assert told["hangs"] == "CUT, out of time"
    assert (out / "work" / "hangs.log").read_text().startswith("it hangs")
    assert "E  wrong" in (out / "summary.txt").read_text()


def test_what_is_prepared_beside_a_step_ends_with_it(out):
    """And has all of the step's time, however it ends; the bench then compiles nothing anew."""
    made, sleeps = out / "made", [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    step = Step("tests", 2, [["true"]], beside=[["false"], sleeps, ["touch", str(made)]])
    ((_, what, seconds),) = perform([step], out, total=PATIENCE)
    assert what == "ok" and made.exists() and 2 <= seconds < 600


def test_each_case_of_the_bench_is_compiled_beside_the_tests(out, monkeypatch):
    monkeypatch.setattr(gpu_steps, "carried", lambda: True)
    todo = {step.name: step for step in plan(out)}
    (bench,), warm = todo["bench"].commands, todo["tests"].beside

    def value(command, option):
        return command[command.index(option) + 1].split(",")

    raced = {(op, size) for op in value(bench, "--ops") for size in value(bench, "--sizes")}
    assert {(*value(x, "--ops"), *value(x, "--sizes")) for x in warm} == raced
    assert all("--out" not in x and value(x, "--budget") == ["0"] for x in warm)
    for option in ("--dtype", "--causal", "--device"):
        assert {*value(bench, option)} == {y for x in warm for y in value(x, option)}


def test_assemblers_run_side_by_side_with_caches_of_their_own(out, monkeypatch):
    monkeypatch.setattr(gpu_steps, "carried", lambda: False)
    smoke = next(step for step in plan(out) if step.name == "smoke")
    assert len(smoke.commands) == len(smoke.variables) == 2
    bundled, wheel = smoke.variables
    assert "TRITON_PTXAS_PATH" not in bundled and wheel["TRITON_PTXAS_PATH"] == "/p"
    assert bundled["TRITON_CACHE_DIR"] != wheel["TRITON_CACHE_DIR"]


def test_each_assembler_that_is_here_is_found():
    """Each is a program; Triton has one for Blackwell beside its own."""
    pytest.importorskip("triton")
    found = gpu_steps.found_assemblers()
    assert {"bundled", "no wgmma", "blackwell"} <= found.keys()
    assert all(os.access(path, os.X_OK) for path in found.values() if path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(out):
    done = script(out)
    assert done.returncode == 1 and done.stderr.startswith("no GPU: torch cannot name one")


def test_table_of_the_last_epoch(tmp_path):
    lines = ["architecture,attention_type,epoch,images_per_second"]
    lines += ["CNN,Local,1,10", "CNN,Local,2,50000", "MLP,None,1,20", "MLP,None,2,100000"]
    (tmp_path / "experiment_results.csv").write_text("\n".join(lines))
    found = rates(tmp_path)
    assert found == {("CNN", "Local"): 50_000, ("MLP", "None"): 100_000}
    text = table(found).splitlines()
    assert text[0].split() == ["MLP", "None", "100,000", "images/s"]
    assert text[-1] == "2 runs × 100 epochs × 50,000 images: 150 s of training"
