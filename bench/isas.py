"""The bars of the CPU kernels in each instruction set: measured, or read from what was measured.

    python bench/isas.py OUT [--isas avx2,avx512] [--ops linear,mla] [--budget 1] [--threads 2]
                             [--processes 5]

Runs `tab bench` for each op into OUT/<isa>/<op>.json, one after the other, with TAB's kernels and
PyTorch (ATen, Inductor, oneDNN, MKL) held to the same instruction set. It leaves out what lies
there already and the sets that this machine does not have, and prints a Markdown table: how many
times faster TAB is than the fastest of the rivals that a bar names (median, 10th to 90th
percentile), and the bar that it is to reach. What lies in bench/results gets its own table in
docs/benchmarks.md by bench/kernel_speed.py.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# op -> sizes, and the beginnings of the rivals' names
RACES = {
    "linear": ("vision,long,cifar", "eager,compile"),
    "performer": ("vision,long,cifar", "eager,compile,performer-pytorch"),
    "local": ("window,cifar", "chunked,sdpa,flex,local-attention"),
    "sparse": ("bigbird,cifar", "sdpa,flex"),
    "mla": ("cifar", "expand"),
}

# A machine that has AVX-512 is one with AVX2 alone only if the rivals, too, do without: with
# AVX-512 left to MKL, its matrix products are twice as fast. MKL heeds this on Intel's processors.
HELD = {
    "avx2": {
        "TAB_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {"TAB_ISA": "avx512"},
}


@dataclass(frozen=True)
class Bar:
    op: str
    size: str
    rivals: str  # the beginning of their names; "" for all
    forward: float | None
    both: float | None


BARS = [
    Bar("linear", "vision", "", 2, 3),
    Bar("linear", "long", "", 2, 3),
    Bar("performer", "vision", "performer-pytorch", 4, 6),
    Bar("performer", "vision", "compile", 2, 3),
    Bar("local", "window", "flex-64", 2, None),
    Bar("local", "window", "chunked", None, 2),
    Bar("local", "window", "sdpa+mask", 8, 7),
    Bar("sparse", "bigbird", "flex-64", 2, None),
    Bar("sparse", "bigbird", "sdpa+mask", 8, 6),
    Bar("mla", "cifar", "expand", 2, 2),
    *(Bar(op, "cifar", "", 1.3, 1.5) for op in RACES if op != "mla"),
]


def why_not(isa: str) -> str | None:
    """The kernels' own word on why they cannot run in this instruction set here."""
    code = "import torch, tab.ops; torch.ops.tab.peak(torch.zeros(1 << 16), 0, 1)"
    tried = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **HELD[isa]},
        capture_output=True,
        text=True,
    )
    return tried.stderr.strip().splitlines()[-1] if tried.returncode else None


def measure(op: str, isa: str, out: Path, options: argparse.Namespace) -> None:
    sizes, rivals = RACES[op]
    words = ["bench", "--ops", op, "--sizes", sizes, "--contestants", rivals]
    words += ["--directions", "forward,both", "--budget", str(options.budget)]
    words += ["--threads", str(options.threads), "--processes", str(options.processes)]
    words += ["--out", str(out)]
    command = [sys.executable, "-m", "tab", *words]
    subprocess.run(command, env={**os.environ, **HELD[isa]}, check=True)


def reached(bar: Bar, direction: str, rows: list) -> str:
    """One cell: what was measured, and whether the bar is met."""
    from tab.bench.rows import percentiles, row_speedup

    wanted = getattr(bar, direction)
    if wanted is None:
        return ""
    here = [r for r in rows if r.case.split("/")[1] == bar.size and r.seconds.get(direction)]
    (ours,) = (row for row in here if row.contestant == "tab")
    rivals = [
        row
        for row in here
        if row.contestant.startswith(bar.rivals) and row.contestant.split()[0] != "tab"
    ]
    if not rivals:
        return f"none ran (bar {wanted:g})"
    best = min(rivals, key=lambda row: percentiles(row.seconds[direction])[1])
    low, mid, high = row_speedup(best, ours, direction)
    sign = "≥" if mid >= wanted else "<"
    return f"{mid:.1f} ({low:.1f}–{high:.1f}) {sign} {wanted:g}, {best.contestant}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--isas", default=",".join(HELD))
    parser.add_argument("--ops", default=",".join(RACES))
    parser.add_argument("--budget", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=5)
    options = parser.parse_args()
    isas, ops = options.isas.split(","), options.ops.split(",")
    for isa in list(isas):
        files = {op: options.out / isa / f"{op}.json" for op in ops}
        missing = [op for op, file in files.items() if not file.is_file()]
        if missing and (reason := why_not(isa)):
            print(f"{isa} is left out: {reason}", file=sys.stderr)
            isas.remove(isa)
            continue
        for op in missing:
            measure(op, isa, files[op], options)
    if not isas:
        sys.exit("none of these instruction sets runs here: give another one by --isas")

    from tab.bench.results import load

    heads = [f"{isa} {what}" for isa in isas for what in ("forward", "forward + backward")]
    print("| op and size | against |", " | ".join(heads), "|")
    print("|---" * (2 + len(heads)) + "|")
    for bar in BARS:
        if bar.op in ops:
            rows = [load(options.out / isa / f"{bar.op}.json")[1] for isa in isas]
            cells = [reached(bar, way, found) for found in rows for way in ("forward", "both")]
            print(
                f"| `{bar.op}` {bar.size} | {bar.rivals or 'the fastest'} |", " | ".join(cells), "|"
            )


if __name__ == "__main__":
    main()
