"""A comparison of a second, and what it must come to wherever and however often it is begun."""

import csv
import json
from pathlib import Path

from tab.compare.columns import MEASURED
from tab.compare.driver import compare
from tab.compare.plan import Grid, Plan
from tab.recipe.recipe import load_recipe

SMALL = {
    "train.epochs": 15,  # half a second: time to be killed in the middle
    "train.batch_size": 20,
    "data.images": 60,
    "data.validation": 20,
    "model.mlp.hidden": 8,
    "model.mlp.tokens": 4,
    "attention.multi_head.num_heads": 2,
    "attention.linear.num_heads": 2,
}
GRID = Grid("quick", ["mlp"], ["none", "self", "multi_head", "linear"], 1, "shapes:100/20", "cpu")
RUNS = 4


def begin(out: Path, dataset) -> Path:
    Plan(load_recipe("quick", SMALL), GRID).save(out, dataset)
    return out


def resume(out: Path, dataset, executor=None) -> None:
    compare(Plan.load(out), dataset, out, executor=executor)


def finished(out: Path) -> dict[str, int]:
    """When each finished run ended: it must not be run again."""
    paths = out.glob("runs/*/run.json")
    done = [p for p in paths if json.loads(p.read_text())["status"] == "done"]
    return {path.parent.name: path.stat().st_mtime_ns for path in done}


def numbers(out: Path) -> list[list[dict]]:
    """Both CSV files but for what is measured in seconds and bytes."""
    tables = []
    for name in ("experiment_results.csv", "experiment_summary.csv"):
        with (out / name).open(newline="") as file:
            lines = list(csv.DictReader(file))
        tables.append([{k: v for k, v in line.items() if k not in MEASURED} for line in lines])
    return tables


def weights(out: Path) -> dict[str, bytes]:
    paths = sorted(out.glob("runs/*/model.safetensors"))
    return {path.parent.name: path.read_bytes() for path in paths}


def same(out: Path, unbroken: Path, before: dict[str, int]) -> None:
    """The numbers and weights of an unbroken comparison, without running again what had ended."""
    assert numbers(out) == numbers(unbroken)
    assert weights(out) == weights(unbroken) and len(weights(out)) == RUNS
    assert before.items() <= finished(out).items()
