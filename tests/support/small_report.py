"""Hand-written runs, as a report reads them."""

from pathlib import Path

import matplotlib.image
import numpy as np

from tab.analysis.corruptions import OWN
from tab.compare.plan import Grid
from tab.compare.runs import Run
from tab.report import markdown
from tab.report.chart_data import NOTE as BELOW
from tab.report.chart_data import Group, charts, looks, tradeoff_group
from tab.report.forest import forest_group
from tab.report.html import html_page
from tab.report.tables import ranking

NOTE = "drawn <script>document.title = 'broken'</script>"

FACTS = {
    "dataset": {"name": "shapes", "note": "drawn, not CIFAR-10", "fingerprint": "0"},
    **{
        "device": "cpu",
        "cpu": "Z80",
        "threads": 2,
        "torch": "2.14",
        "python": "3.11",
        "tab": "0.1",
    },
    "commit": None,
}


def run(attention="none", accuracy=0.5, seconds=10.0, seed=0, model="cnn", status="done") -> Run:
    rows = [
        {
            **{"epoch": e, "train_loss": 2.0 / e, "train_accuracy": 0.9 * accuracy * e / 3},
            **{"test_accuracy": accuracy * e / 3, "validation_accuracy": None},
            **{"seconds": seconds / 3, "cumulative_training_time": seconds * e / 3},
        }
        for e in (1, 2, 3)
    ]
    summary = {
        **{"final_test_accuracy": accuracy, "final_train_accuracy": 0.9 * accuracy},
        **{"total_training_time": seconds, "images_per_second": 1234.0, "parameters": 5_000_000},
        **{"flops": 7_000, "peak_memory_bytes": 2**30},
    }
    path = Path(f"runs/{model}-{attention}-s{seed}")
    return Run(model, attention, seed, path, status, rows, summary, "Oops: boom", "cpu", threads=1)


def measured(run) -> dict:
    """A robustness.json."""
    return {
        "noise": {"settings": {"sigma": [0.0, 0.5, 1.0]}, "accuracy": [run.accuracy, 0.3, 0.2]},
        "attacks": {"pgd": 0.0, "suspicions": []},
        **{f"own/{kind}": {"accuracy": [0.5, 0.4, 0.3, 0.2, 0.1]} for kind in OWN},
    }


def page(tmp_path, **more) -> str:
    """report.html of four mechanisms with two seeds each."""
    kinds = {"none": 0.50, "self": 0.55, "local": 0.45, "linear": 0.60}
    runs = [
        run(kind, accuracy + s / 50 + ("i" in kind) * s / 100, 10 + len(kind), seed=s)
        for kind, accuracy in kinds.items()
        for s in (0, 1)
    ]
    for each in runs:
        if each.attention == "local":  # its first epoch was disturbed
            each.rows[0]["seconds"] *= 4
    facts = FACTS | {"dataset": FACTS["dataset"] | {"note": NOTE}}
    text = markdown.report(runs, facts, Grid("fair", ["cnn"], [*kinds], 2, "shapes", "cpu"), {})
    matplotlib.image.imsave(tmp_path / "a.png", np.zeros((4, 4, 3)))
    pictures = {tmp_path / "a.png": 'a "quoted" <caption>'}
    ranked = {"cnn": ranking(runs, "cnn")}
    found = {r.id: measured(r) for r in runs}
    groups = [forest_group(ranked), tradeoff_group(runs, found)]
    groups.append(Group("Charts", BELOW, charts(runs, runs, "test", found)))
    return html_page(text, looks(kinds), groups, pictures, more.get("bench"))
