"""An op from a package outside of this tree, examples/retention, is treated like one of ours."""

import csv
import json
import os
import shutil
import tomllib

import pytest
from forks import python
from paths import ROOT

pytestmark = pytest.mark.slow

SOURCE = ROOT / "examples/retention"
COMPARE = (
    "compare --models mlp --attentions none,linear,retention --recipe quick --data shapes:200/40 "
    "--epochs 1 --seeds 2 --batch-seeds 2 --set data.images=100 --set data.validation=20 "
    "--set train.batch_size=20 --device cpu --out results"
)
BENCH = (
    "bench --ops retention --sizes tiny --causal yes --contestants tab,eager "
    "--directions forward,both --budget 0.01 --processes 1 --out bench.json"
)
STEPS = (
    "bench steps --recipe quick --models mlp --attentions retention --batch 2 --budget 0 "
    "--processes 1 --out steps.json"
)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """As pip would install it: the module, and what its project file declares."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(SOURCE / "retention", folder / "retention")
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]
    facts = folder / f"{project['name']}-{project['version']}.dist-info"
    facts.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (facts / "METADATA").write_text(head)
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {where}" for name, where in points.items())]
    (facts / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def run(package, folder, *words):
    before = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(package), before]),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    ran = python(*words, folder=folder, environment=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran


def test_it_is_proven_like_ours(package, tmp_path):
    """Its own tests, with the tools that an op is tested with here."""
    shutil.copy(SOURCE / "test_retention.py", tmp_path)
    run(package, tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_retention.py")


def test_it_is_trained_compared_and_reported(package, tmp_path):
    ran = run(package, tmp_path, "-m", "tab", *COMPARE.split())
    assert "one seed after the other" not in ran.stderr  # its layer says that it stacks
    with (tmp_path / "results/experiment_summary.csv").open(newline="") as file:
        rows = {row["attention_type"]: row for row in csv.DictReader(file)}
    control, linear, own = (int(rows[n]["flops"]) for n in ("Control", "linear", "retention"))
    assert own > control and own != linear
    report = (tmp_path / "results/report.md").read_text()
    assert "| Retention |" in report
    # Without the package it is known by the name it was trained under.
    run(tmp_path, tmp_path, "-m", "tab", "report", "results")
    assert "not drawn: retention" in (tmp_path / "results/report.md").read_text()
    assert "| retention |" in (tmp_path / "results/report.md").read_text()


def test_it_is_benchmarked(package, tmp_path):
    run(package, tmp_path, "-m", "tab", *BENCH.split())
    rows = {
        row["contestant"]: row for row in json.loads((tmp_path / "bench.json").read_text())["rows"]
    }
    assert list(rows) == ["tab", "tab reference", "tab cpp", "eager"]
    assert rows["tab cpp"]["skipped"] == "retention_fwd has no cpp kernel"
    for name in ("tab", "tab reference", "eager"):
        assert not rows[name]["skipped"] and len(rows[name]["seconds"]["both"]) >= 2
    run(package, tmp_path, "-m", "tab", *STEPS.split())
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [row["contestant"] for row in rows] == ["none", "tab retention", "eager retention"]
    assert not rows[2]["skipped"] and rows[2]["error"] < 1e-4
