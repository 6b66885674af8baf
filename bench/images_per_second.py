"""Images/s of every run of a comparison, in its last epoch (the first compiles and captures), and
what the published grid would take at these rates: `python bench/images_per_second.py RESULTS`."""

import csv
import sys
from pathlib import Path

EPOCHS, IMAGES = 100, 50_000  # of a run of the published study


def rates(folder: Path) -> dict[tuple[str, str], float]:
    """(architecture, attention) -> images/s in the last epoch of its last seed."""
    with (folder / "experiment_results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    named = lambda line: (line["architecture"], line["attention_type"])  # noqa: E731
    return {named(line): float(line["images_per_second"]) for line in lines}


def table(found: dict[tuple[str, str], float]) -> str:
    """One line a run, the slowest last, then the time of the whole grid."""
    order = sorted(found.items(), key=lambda item: -item[1])
    lines = [
        f"{model:4} {attention:28} {rate:12,.0f} images/s" for (model, attention), rate in order
    ]
    seconds = sum(EPOCHS * IMAGES / rate for rate in found.values())
    total = f"{len(found)} runs × {EPOCHS} epochs × {IMAGES:,} images: {seconds:,.0f} s of training"
    return "\n".join([*lines, total])


if __name__ == "__main__":
    print(table(rates(Path(sys.argv[1]))))
