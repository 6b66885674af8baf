"""What packed batches cost: sequences of mixed lengths one behind the other (`cu_seqlens`), beside
the same tokens as a dense batch of one length, beside the batch padded to the longest (with
key_mask, where the function takes one), and beside a loop in Python over the sequences. All take
turns in shuffled order, on one thread, whose own processor time is counted, so that other processes
delay nothing.

    python bench/packed.py [--sequences 64] [--shortest 32] [--longest 512] [--rounds 21]

Prints a table in Markdown: the median of the rounds in ms, and its 10th and 90th percentile.
"equal" holds as many tokens as "packed"; its sequences have the mean length, which is another
amount of work where that grows with the square of the length (mla).
"""

import argparse
import functools
import random
import statistics
import time
from functools import partial

import torch

import tab
from tab.bench.rows import percentiles

LATENT, ROTARY = 64, 16  # of mla


@functools.cache
def near(tokens: int) -> tab.BlockPattern:
    return tab.BlockPattern.sliding_window(tokens, window=2, sinks=1, block_size=32)


def sparse(q, k, v, **options):
    pattern = near if "cu_seqlens" in options else near(q.shape[2])
    return tab.sparse_attention(q, k, v, pattern, causal=True, **options)


def functions(width: int):
    """name -> (the function, whether it takes a key_mask)"""
    w = tab.orthogonal_projection(128, width, generator=torch.Generator().manual_seed(0))
    return {
        "linear": (tab.linear_attention, True),
        "linear, causal": (partial(tab.linear_attention, causal=True), True),
        "performer": (partial(tab.performer_attention, projection=w), True),
        "local, window 64, causal": (partial(tab.local_attention, window=64, causal=True), False),
        "sparse, 3 blocks of 32, causal": (sparse, True),
        "mla, causal": (partial(tab.mla_attention, causal=True, form="fused"), True),
    }


def operands(name: str, heads: int, width: int, batch: int, tokens: int):
    """-> leaves, and the dimension of the tokens in each."""
    g = torch.Generator().manual_seed(0)
    shapes, dims = [(batch, heads, tokens, width)] * 3, (2, 2, 2)
    if name.startswith("mla"):
        shapes = [
            (batch, heads, tokens, width), (batch, heads, tokens, ROTARY), (batch, tokens, LATENT),
            (batch, tokens, ROTARY), (heads, width, LATENT), (heads, width, LATENT),
        ]  # fmt: skip
        dims = (2, 2, 1, 1, None, None)
    # Token by token in memory, as a projection gives them.
    x = [
        torch.randn(s[0], s[2], s[1], s[3], generator=g).transpose(1, 2)
        if d == 2
        else torch.randn(s, generator=g) / 8
        for s, d in zip(shapes, dims, strict=True)
    ]
    return [t.requires_grad_() for t in x], dims


def contestants(lengths: list[int], heads: int, width: int):
    """(op, how, forward, forward and backward)"""
    tokens, count, longest = sum(lengths), len(lengths), max(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    for name, (f, masked) in functions(width).items():
        x, dims = operands(name, heads, width, 1, tokens)
        dense, _ = operands(name, heads, width, count, tokens // count)
        padded, _ = operands(name, heads, width, count, longest)

        def loop(*x, f=f, dims=dims):
            parts = [
                [t] * count if d is None else t.split(lengths, d)
                for t, d in zip(x, dims, strict=True)
            ]
            return torch.cat([f(*part) for part in zip(*parts, strict=True)], 2)

        ways = {
            "packed": (partial(f, cu_seqlens=cu), x),
            "equal": (f, dense),
            "padded": (partial(f, key_mask=real) if masked else f, padded),
            "loop": (loop, x),
        }
        for how, (g, given) in ways.items():
            plain, do = [t.detach() for t in given], torch.ones_like(g(*given))

            def forward(g=g, x=plain):
                g(*x)

            def both(g=g, x=given, do=do):
                torch.autograd.grad(g(*x), x, do)

            yield name, how, forward, both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=32)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", default="", help="functions whose names hold this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(0)
    lengths = [draw.randint(args.shortest, args.longest) for _ in range(args.sequences)]
    lengths[-1] += -sum(lengths) % len(lengths)  # so that the equal batch has as many tokens
    print(
        f"{len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in "
        f"all; H {args.heads}, D {args.width}, float32, ms of one thread\n"
    )
    print("| op | batch | forward | × packed | forward and backward | × packed |")
    print("|---|---|---|---|---|---|")
    every = [x for x in contestants(lengths, args.heads, args.width) if args.only in x[0]]
    for name in dict.fromkeys(x[0] for x in every):
        rows = [x for x in every if x[0] == name]
        times: list[list[list[float]]] = [[[], []] for _ in rows]
        for turn in range(args.rounds + 1):  # one to warm up
            for i, part in draw.sample(
                [(i, p) for i in range(len(rows)) for p in (0, 1)], 2 * len(rows)
            ):
                start = time.process_time()
                rows[i][2 + part]()
                if turn:
                    times[i][part].append(1e3 * (time.process_time() - start))
        base = [statistics.median(x) for x in times[0]]
        for (_, how, *_), row in zip(rows, times, strict=True):
            cells = [
                f"{told(x)} | {statistics.median(x) / b:.2f}"
                for x, b in zip(row, base, strict=True)
            ]
            print(f"| {name} | {how} | {' | '.join(cells)} |", flush=True)


def told(x: list[float]) -> str:
    low, middle, high = percentiles(x)
    return f"{middle:.1f} ({low:.1f} – {high:.1f})"


if __name__ == "__main__":
    main()
