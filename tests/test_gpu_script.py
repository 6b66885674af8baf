"""bench/gpu.sh as far as it goes without a GPU, and the table that it prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
from images_per_second import rates, table  # noqa: E402


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
    assert list(steps) == ["build", "tests", "sanitizer", "study", "bench"]
    assert "--data shapes:100/20 --device cuda" in done.stdout
    assert list(map(int, steps.values())) == [150, 220, 45, 150, 170]
    named = re.search(r"^tests, .*-p no:cacheprovider (.*)$", done.stdout, re.M)[1].split()
    mark = "mark" + ".gpu"  # in two words: this file has none
    marked = {p.name for p in ROOT.glob("tests/test_*.py") if mark in p.read_text()}
    assert {Path(name).name for name in named} == marked
    assert not (ROOT / "tab" / "kernels").is_symlink()


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
