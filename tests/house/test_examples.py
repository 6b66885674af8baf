"""The examples run as a reader runs them: each in a process of its own, outside the source tree."""

import os
import subprocess
import sys
from pathlib import Path

from paths import ROOT

EXAMPLES = ROOT / "examples"


def run(*words: object, folder: Path, path: Path = ROOT) -> str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *map(str, words)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_use_an_op(tmp_path):
    out = run(EXAMPLES / "use_an_op.py", folder=tmp_path)
    differences = [float(line.rsplit(" ", 1)[1]) for line in out.splitlines()[1:]]
    assert len(differences) == 2 and max(differences) < 1e-5


def test_train_one_model(tmp_path):
    out = run(EXAMPLES / "train_one_model.py", tmp_path / "run", folder=tmp_path)
    assert "epoch 2" in out and "logits (1, 10)" in out
    assert (tmp_path / "run/run.json").is_file()


def test_an_attention_in_a_package_of_its_own(tmp_path):
    """Installed beside TAB, which finds it by its entry point."""
    package = tmp_path / "package"
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target")
    source = tmp_path / "source"  # the build writes beside its sources
    source.mkdir()
    for file in (EXAMPLES / "sigmoid_attention").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    run(*pip, package, source, folder=tmp_path)
    options = (
        "--models mlp --attentions none,sigmoid --recipe quick --data shapes:200/40 --epochs 1"
    )
    sizes = "--set data.images=100 --set data.validation=20 --set train.batch_size=20"
    words = ("-m", "tab", "compare", *options.split(), *sizes.split(), "--out", "results")
    run(*words, folder=tmp_path, path=package)
    summary = (tmp_path / "results/experiment_summary.csv").read_text()
    assert "MLP - sigmoid" in summary
