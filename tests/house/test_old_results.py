"""Results that version 0.1 left behind go on, and come to the numbers that it came to itself.

fixtures/results-0.1.tar.xz holds a comparison, a sweep and a run of that version, each stopped
midway, and under `after` what it made of them when it resumed them: the CSV files, the rows, and a
finished comparison with its models and robustness.
"""

import csv
import json
import tarfile
import tomllib
from pathlib import Path

import pytest
from paths import FIXTURES
from typer.testing import CliRunner

from tab.cli.main import app
from tab.compare.columns import MEASURED

ARCHIVE = FIXTURES / "results-0.1.tar.xz"


@pytest.fixture
def old(tmp_path, one_thread) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def tab(*words: object) -> str:
    ran = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return ran.output


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


GONE = {"p_holm"}  # Holm's correction gave way to Dunnett's, p_adjusted


def agree(new: Path, before: Path, measured=frozenset()) -> None:
    """Every column of the old file stands in the new one with the same value, times apart."""
    new_rows, old_rows = table(new), table(before)
    assert len(new_rows) == len(old_rows) > 0
    for here, there in zip(new_rows, old_rows, strict=True):
        for name in there.keys() - measured - GONE:
            want = number(there[name])
            want = want if isinstance(want, str) else pytest.approx(want, abs=1e-4)
            assert number(here[name]) == want, name


def test_a_stopped_comparison_resumes(old):
    assert not (old / "compare/runs/mlp-multi_head-s0/run.json").read_text().count('"done"')
    tab("compare", "--resume", old / "compare")
    for name in ("experiment_results.csv", "experiment_summary.csv"):
        agree(old / "compare" / name, old / "after/compare" / name, frozenset(MEASURED))


def test_its_recipe_may_be_named_again(old):
    """Recipes have got models and options since; what this comparison runs is the same."""
    found = tomllib.loads((old / "compare/config.toml").read_text())
    given = {
        f"{part}.{key}": value for part in ("train", "data") for key, value in found[part].items()
    }
    given |= {f"model.{m}.{k}": v for m, table in found["model"].items() for k, v in table.items()}
    for name, table in found["attention"].items():
        for key, value in table.items():
            if not isinstance(value, dict):
                given[f"attention.{name}.{key}"] = value
    sets = [f"--set={key}={json.dumps(value)}" for key, value in given.items()]
    tab("compare", "--resume", old / "compare", "--recipe", found["grid"]["recipe"], *sets)
    with pytest.raises(AssertionError, match="the recipe is then another one"):
        tab("compare", "--resume", old / "compare", *sets, "--set=train.lr=0.5")


def test_a_stopped_run_resumes(old):
    arguments = json.loads((old / "train/run.json").read_text())
    assert arguments["status"] != "done"
    settings = (
        "--set=train.batch_size=20 --set=data.images=60 --set=data.validation=20 "
        "--set=model.mlp.hidden=4 --set=model.mlp.tokens=2 "
        "--set=attention.multi_head.num_heads=2 --set=attention.linear.num_heads=2 "
        "--recipe=quick --data=shapes:100/20 --epochs=3 --device=cpu --resume"
    )
    tab("train", "mlp", "linear", *settings.split(), "--out", old / "train")
    new, before = (
        [json.loads(line) for line in (old / folder / "train/rows.jsonl").read_text().splitlines()]
        for folder in ("", "after")
    )
    assert [row["train_loss"] for row in new] == pytest.approx(
        [row["train_loss"] for row in before], abs=1e-4
    )


def test_a_stopped_sweep_resumes(old):
    tab("sweep", "--resume", old / "sweep")
    agree(old / "sweep/trials.csv", old / "after/sweep/trials.csv", frozenset({"seconds"}))
    assert "lr" in (old / "sweep/winners.toml").read_text()


def test_a_finished_comparison_is_reported(old):
    tab("report", old / "after/compare")
    report = (old / "after/compare/report.md").read_text()
    assert "Multi-Head" in report and "Linear" in report
