"""What grouped-query attention costs beside multi-head attention: the same op on the same queries,
with fewer and fewer heads of k and v. All take turns in shuffled order, on one thread, whose own
processor time is counted, so that other processes delay nothing.

    python bench/grouped_heads.py [--heads 8] [--tokens 1024] [--rounds 21]

Prints a table in Markdown: the median of the rounds in ms, and its 10th and 90th percentile.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

import tab

WIDTH = 64


def calls(heads: int, tokens: int):
    """(op, H_kv, "forward" or "forward and backward", call)"""
    g = torch.Generator().manual_seed(0)
    pattern = tab.BlockPattern.sliding_window(tokens, window=4, sinks=1)
    w = tab.orthogonal_projection(128, WIDTH, generator=g)
    ops = {
        "linear, causal": partial(tab.linear_attention, causal=True),
        "performer": partial(tab.performer_attention, projection=w),
        "local, window 128, causal": partial(tab.local_attention, window=128, causal=True),
        "sparse, 4 blocks and a sink": partial(tab.sparse_attention, pattern=pattern, causal=True),
    }
    q = torch.randn(1, heads, tokens, WIDTH, generator=g)
    do = torch.ones_like(q)
    for name, op in ops.items():
        for kv in (heads, heads // 4, 1):
            k, v = (torch.randn(1, kv, tokens, WIDTH, generator=g) for _ in range(2))
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]

            def forward(op=op, x=(q, k, v)):
                op(*x)

            def both(op=op, x=leaves, do=do):
                torch.autograd.grad(op(*x), x, do)

            yield name, kv, "forward", forward
            yield name, kv, "forward and backward", both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    torch.set_num_threads(1)
    contestants = list(calls(args.heads, args.tokens))
    times = in_turns([call for *_, call in contestants], args.rounds)
    print(f"B 1, H {args.heads}, N {args.tokens}, D {WIDTH}, float32, ms of one thread\n")
    print("| op | H_kv | forward | forward and backward |\n|---|---|---|---|")
    for i in range(0, len(contestants), 2):
        name, kv, _, _ = contestants[i]
        print(f"| {name} | {kv} | {told(times[i])} | {told(times[i + 1])} |")


def in_turns(calls: list[Callable[[], None]], rounds: int) -> list[list[float]]:
    """ms of processor time of each call in each round, in shuffled order."""
    times: list[list[float]] = [[] for _ in calls]
    order = random.Random(0)
    for turn in range(rounds + 2):  # two to warm up
        for i in order.sample(range(len(calls)), len(calls)):
            start = time.process_time()
            calls[i]()
            if turn >= 2:
                times[i].append(1e3 * (time.process_time() - start))
    return times


def told(x: list[float]) -> str:
    tenths = statistics.quantiles(x, n=10)
    return f"{statistics.median(x):.2f} ({tenths[0]:.2f} – {tenths[-1]:.2f})"


if __name__ == "__main__":
    main()
