"""README's picture and the tables of docs/benchmarks.md, of the committed times:

    python bench/kernel_speed.py [RESULTS] [PICTURE]

For each operator and size: how many times slower than TAB's kernel the best of everything else is,
the median and the 10th and 90th percentile of the ratio within a round. docs/benchmarks.md says how
they are measured. Without RESULTS, a table of every folder in bench/results that has all operators
is written into that page, and the picture is drawn; else the table of RESULTS is printed, and a
picture drawn if one is named.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tab.bench import results
from tab.bench.rows import Row, percentiles, row_speedup
from tab.report.style import figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
MEASURED = RESULTS / "epyc-zen4-2core"  # what the picture shows
PAGE = ROOT / "docs" / "benchmarks.md"
MARKS = "<!-- written by bench/kernel_speed.py: -->", "<!-- up to here -->"
PICTURE = ROOT / "docs" / "pictures" / "kernel-speed.svg"
OPS = ("linear", "performer", "local", "sparse", "mla")
LOOKS = {  # direction -> its name, marker, colour and place within a row
    "both": ("forward + backward", "o", "#0072B2", -0.2),
    "forward": ("forward", "D", "#E69F00", 0.2),
}
TICKS = (1, 2, 3, 5, 10, 20, 30)
Ratio = tuple[float, float, float]  # p10, p50, p90


def best_others(folder: Path) -> dict[tuple[str, str], dict[str, tuple[str, Ratio]]]:
    """(operator, size) -> direction -> who of everything else is the fastest, and how many times
    slower than TAB's kernel."""
    found: dict[tuple[str, str], dict[str, tuple[str, Ratio]]] = {}
    for op in OPS:
        cases: dict[str, list[Row]] = {}
        for row in results.load(folder / f"{op}.json")[1]:
            if not row.skipped:
                cases.setdefault(row.case, []).append(row)
        for case, (ours, *others) in cases.items():
            best = {
                direction: min(
                    ((row.contestant, row_speedup(row, ours, direction)) for row in others
                     if direction in row.seconds),
                    key=lambda one: one[1][1],
                )
                for direction in LOOKS
            }  # fmt: skip
            found[op, case.split("/")[1]] = best
    return found


def table(folder: Path) -> list[str]:
    """In Markdown, for either direction: TAB's median in ms, what part of it is the floor, and the
    best of everything else."""
    lines = [
        "| op and size | forward | floor | best other | forward + backward | floor | best other |",
        "|---|---:|---:|---|---:|---:|---|",
    ]
    for (op, size), best in best_others(folder).items():
        (ours,) = (
            row for row in results.load(folder / f"{op}.json")[1]
            if row.case.startswith(f"{op}/{size}/") and row.contestant == "tab"
        )  # fmt: skip
        cells = [f"`{op}` {size}"]
        for direction in ("forward", "both"):
            name, (low, mid, high) = best[direction]
            _, median, _ = percentiles(ours.seconds[direction])
            cells += [f"{1e3 * median:.1f}", f"{ours.floor[direction] / median:.0%}"]
            cells.append(f"{mid:.1f}× ({low:.1f}–{high:.1f}) {name}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def folders() -> list[Path]:
    """All in bench/results that have the times of every operator, one a machine and set."""
    found = (path.parent for path in sorted(RESULTS.rglob(f"{OPS[0]}.json")))
    return [folder for folder in found if all((folder / f"{op}.json").is_file() for op in OPS)]


def tables() -> str:
    """What stands in docs/benchmarks.md: a table of each folder, and above it what was measured."""
    blocks = []
    for folder in folders():
        name, facts = folder.relative_to(RESULTS), results.load(folder / f"{OPS[0]}.json")[0]
        facts = facts["environment"]
        isa = facts.get("TAB_ISA", facts["isa"]).upper().replace("AVX512", "AVX-512")
        machine = f"{facts['cpu']}, {isa}, {facts['threads']} threads, torch {facts['torch']}"
        blocks.append("\n".join([f"`{name}`: {machine}", "", *table(folder)]))
    return "\n\n".join(blocks)


def written(page: str) -> str:
    """The page with these tables between its marks."""
    before, rest = page.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{tables()}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def draw(folder: Path, path: Path) -> None:
    found = best_others(folder)
    environment = results.load(folder / f"{OPS[0]}.json")[0]["environment"]
    with figure(path, 1, width=8.2, height=5.4) as (_, (ax,)):
        for y, best in enumerate(found.values()):
            for direction, (name, marker, colour, shift) in LOOKS.items():
                contestant, (low, mid, high) = best[direction]
                style = {"color": colour, "zorder": 3}
                ax.plot([low, high], [y + shift] * 2, linewidth=1.6, **style)
                said = name if y == 0 else None
                ax.plot([mid], [y + shift], marker, markersize=5, label=said, **style)
                words = f"{mid:.1f}× {contestant}"
                ax.text(1.05 * high, y + shift, words, va="center", fontsize=7, color="#444444")
        ax.axvline(1, color="#000000", linewidth=1.2)
        ax.set_xscale("log")
        ax.set_xlim(0.97, 62)
        ax.set_xticks(TICKS, [f"{tick}×" for tick in TICKS])
        ax.minorticks_off()
        ax.set_yticks(range(len(found)), [f"{op}, {size}" for op, size in found])
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        where = f"{environment['cpu']}, {environment['threads']} threads, float32"
        ax.set_xlabel(f"time of the best of everything else over that of TAB's kernel ({where})")
        ax.legend(loc="upper right", frameon=False)


if __name__ == "__main__":
    folder, picture = [*map(Path, sys.argv[1:3]), None, None][:2]
    if folder:
        print(*table(folder), sep="\n")
    else:
        PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
    if picture or not folder:
        draw(folder or MEASURED, picture or PICTURE)
