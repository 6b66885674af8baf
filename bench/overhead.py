"""What calling an operator costs before any arithmetic: two checkouts with their C++ kernels built,
on tiny tensors (B 1, H 1, N 8, D 8), one thread, in processes that take turns.

    python bench/overhead.py OLD NEW [--turns 5] [--only linear,sparse]

Prints µs a call, the lowest and the median of the turns, and by how much NEW differs.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time

CALLS, BLOCKS = 20, 60  # a time is the mean of CALLS calls; each turn keeps the lowest of BLOCKS
MODES = ("forward", "with grad", "fwd + bwd")


def problems():
    import torch

    import tab

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 8, 8) for _ in range(3))
    w = tab.orthogonal_projection(16, 8)
    pattern = tab.BlockPattern.bigbird(8, heads=1, block_size=4, num_random=0)
    latent, rotary = torch.randn(1, 8, 8), torch.randn(1, 8, 4)
    mla = [q, torch.randn(1, 1, 8, 4), latent, rotary, torch.randn(1, 8, 8), torch.randn(1, 8, 8)]
    cases = {
        "linear": (tab.linear_attention, [q, k, v], {}),
        "performer": (lambda *x: tab.performer_attention(*x, w), [q, k, v], {}),
        "local": (tab.local_attention, [q, k, v], {"window": 2}),
        "sparse": (lambda *x: tab.sparse_attention(*x, pattern), [q, k, v], {}),
        "linformer": (lambda *x: tab.linformer_attention(*x, w[:8]), [q, k, v], {}),
    }
    for form in ("fused", "expand", "absorb"):
        cases[f"mla {form}"] = tab.mla_attention, mla, {"form": form}
    return cases


def measure(only: list[str]) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    gc.disable()
    times = {}
    for name, (function, inputs, options) in problems().items():
        if only and name.split()[0] not in only:
            continue
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        do = torch.ones_like(function(*inputs, **options))

        def forward(x=inputs, function=function, options=options):
            return function(*x, **options)

        def both(x=leaves, do=do, forward=forward):
            torch.autograd.grad(forward(x), x, do)

        for mode, call in zip(MODES, (forward, lambda: forward(leaves), both), strict=True):  # noqa: B023
            blocks = []
            for _ in range(BLOCKS):
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                blocks.append((time.perf_counter() - start) / CALLS * 1e6)
            times[f"{name}, {mode}"] = min(blocks)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkouts", nargs=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    found = [[], []]
    for turn in range(2 * given.turns):
        which = (turn + turn // 2) % 2  # old, new, new, old, …: a drift meets both alike
        environment = os.environ | {"PYTHONPATH": os.path.abspath(given.checkouts[which])}
        command = [sys.executable, "-P", __file__, "--measure", given.only]
        run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        found[which].append(json.loads(run.stdout.splitlines()[-1]))
    print(f"{'µs a call':24}{'old: min, median':>20}{'new: min, median':>20}{'new − old':>16}")
    for case in found[0][0]:
        old, new = ([turn[case] for turn in turns] for turns in found)
        row = [(min(x), statistics.median(x)) for x in (old, new)]
        cells = [f"{low:.1f}, {middle:.1f}" for low, middle in row]
        cells.append(f"{row[1][0] - row[0][0]:+.1f}, {row[1][1] - row[0][1]:+.1f}")
        print(f"{case:24}{cells[0]:>20}{cells[1]:>20}{cells[2]:>16}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure([x for x in sys.argv[2].split(",") if x])))
    else:
        main()
