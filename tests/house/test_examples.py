"""The examples run as a reader runs them: each in a process of its own, outside the source tree."""

import os
from pathlib import Path

import nbformat
import pytest
from forks import python
from nbclient import NotebookClient
from paths import ROOT
from patience import PATIENCE

EXAMPLES = ROOT / "examples"


def run(*words: object, folder: Path, path: Path = ROOT) -> str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    ran = python(*words, folder=folder, environment=environment)
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


@pytest.mark.any_torch  # a kernel and three trainings: once is enough
def test_notebook(tmp_path, monkeypatch):
    """From its top to its end, in a kernel of its own; what is committed has no outputs."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / "study.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in cells if cell.outputs or cell.execution_count]
    patient = {"timeout": PATIENCE, "startup_timeout": PATIENCE}
    NotebookClient(notebook, resources={"metadata": {"path": tmp_path}}, **patient).execute()
    shown = [
        {k: v for out in cell.outputs for k, v in out.get("data", {}).items()} for cell in cells
    ]
    table, summary, picture, best, same, swapped, timings = shown[1:]
    assert table["text/html"].count("<tr>") == 4 and "3 of 3 runs done" in table["text/html"]
    assert "dataframe" in summary["text/html"] and "image/png" in picture
    assert "torch.Size([1, 10])" in best["text/plain"]
    assert float(same["text/plain"][len("tensor(") : -1]) < 1e-5
    assert "PerformerAttention" in swapped["text/plain"] and "eager" in timings["text/html"]
