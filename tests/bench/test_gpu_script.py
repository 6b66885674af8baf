"""bench/gpu.sh as far as it goes without a GPU, and the table that it prints."""

import os
import re
import subprocess
import sys

import pytest
import torch
from paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))
from images_per_second import rates, table


def run(out, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), str(out)],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_steps_and_their_times(tmp_path):
    done = run(tmp_path, DRY="1", TAB_DATA="shapes:100/20")
    assert done.returncode == 0, done.stderr
    steps = dict(re.findall(r"^(\w+), (\d+) s: ", done.stdout, re.M))
    fixed = ["build", "sanitizer", "study", "bench"]
    tests = {name for name in steps if name not in fixed}
    assert [name for name in steps if name not in tests] == fixed
    assert "--data shapes:100/20 --device cuda" in done.stdout
    times = [int(steps[name]) for name in ("build", "train_step", "sanitizer", "study", "bench")]
    assert times == [150, 220, 45, 150, 170]
    mark = "mark" + ".gpu"  # in two words: this file has none
    paths = [path for path in ROOT.glob("tests/*/test_*.py") if mark in path.read_text()]
    marked = {f"{path.parent.name}_{path.stem.removeprefix('test_')}" for path in paths}
    assert tests == marked | {"ops_triton_gpu_performer"}
    assert not (ROOT / "tab" / "kernels").is_symlink()


PYTHON = """#!/bin/sh
case "$*" in
*get_device_capability*) echo 9.0 ;;
*build_ext*) echo "error: no compiler"; exit 1 ;;
*test_step.py*) echo "begun"; sleep 60 ;;
*pytest*) echo "3 passed in 1.00s" ;;
*"tab compare"*) while [ "$1" != --out ]; do shift; done; mkdir "$2"; exit 2 ;;
esac
"""


def test_what_fails_and_what_hangs_costs_only_itself(tmp_path):
    """With a Python that only says what its steps might: the summary is whole, and last."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    done = run(tmp_path / "out", PYTHON=str(python), MOST="2", TORCH_CUDA_ARCH_LIST="")
    assert done.returncode == 1
    summary = done.stdout
    assert re.search(r"^build: FAILED \(1\), \d s\nerror: no compiler$", summary, re.M)
    assert re.search(r"^train_step: CUT, out of time, \d s$", summary, re.M)
    assert re.search(r"^ops_triton_gpu: ok, \d s\n3 passed", summary, re.M)
    assert re.search(r"^study: FAILED \(2\)", summary, re.M)
    assert summary.splitlines()[-1] == "3 passed in 1.00s"  # the bench
    assert (tmp_path / "out" / "study.tgz").exists()
    assert (tmp_path / "out" / "train_step.log").read_text() == "begun\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 1 and done.stdout.startswith("no GPU: torch cannot name one")


def test_table_of_the_last_epoch(tmp_path):
    lines = ["architecture,attention_type,epoch,images_per_second"]
    lines += ["CNN,Local,1,10", "CNN,Local,2,50000", "MLP,None,1,20", "MLP,None,2,100000"]
    (tmp_path / "experiment_results.csv").write_text("\n".join(lines))
    found = rates(tmp_path)
    assert found == {("CNN", "Local"): 50_000, ("MLP", "None"): 100_000}
    text = table(found).splitlines()
    assert text[0].split() == ["MLP", "None", "100,000", "images/s"]
    assert text[-1] == "2 runs × 100 epochs × 50,000 images: 150 s of training"
