"""Hand-written runs, as a report reads them."""

from pathlib import Path

from tab.compare.runs import Run

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
            "cumulative_training_time": seconds * e / 3,
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
