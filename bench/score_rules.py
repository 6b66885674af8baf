"""What key masks, softcap, ALiBi and sinks cost in local and sparse attention: the same call with
one of them and with none, all in turns, in shuffled order, on one thread, whose own processor time
is counted.

    python bench/score_rules.py [--heads 8] [--tokens 1024] [--rounds 21] [--batch 2]

Prints a table in Markdown: the median of the rounds in ms, its 10th and 90th percentile, and in
brackets the ratio to the call without any.
"""

import argparse
import statistics
from functools import partial

import torch
from grouped_heads import WIDTH, in_turns, told

import tab

PLAIN = "none of them"


def rules(batch: int, heads: int, tokens: int) -> dict[str, dict]:
    i = torch.arange(tokens).expand(batch, tokens)
    here_and_there = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(1)) < 0.5
    slopes = 2.0 ** -torch.arange(1.0, heads + 1)
    return {
        PLAIN: {},
        "key_mask, all real": {"key_mask": i >= 0},
        "key_mask, half is padding": {"key_mask": i < tokens // 2},
        "key_mask, every second token or so": {"key_mask": here_and_there},
        "softcap": {"softcap": 30.0},
        "alibi": {"alibi": slopes},
        "sinks": {"sinks": torch.zeros(heads)},
    }


def calls(batch: int, heads: int, tokens: int):
    """(op, rule, forward, forward and backward)"""
    g = torch.Generator().manual_seed(0)
    pattern = tab.BlockPattern.sliding_window(tokens, window=4, sinks=1)
    ops = {
        "local, window 128, causal": partial(tab.local_attention, window=128, causal=True),
        "sparse, 4 blocks and a sink": partial(tab.sparse_attention, pattern=pattern, causal=True),
    }
    leaves = [
        torch.randn(batch, heads, tokens, WIDTH, generator=g).requires_grad_() for _ in range(3)
    ]
    do = torch.ones_like(leaves[0])
    for name, op in ops.items():
        for rule, options in rules(batch, heads, tokens).items():

            def forward(op=op, options=options):
                with torch.no_grad():
                    op(*leaves, **options)

            def both(op=op, options=options):
                torch.autograd.grad(op(*leaves, **options), leaves, do)

            yield name, rule, forward, both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    torch.set_num_threads(1)
    contestants = list(calls(args.batch, args.heads, args.tokens))
    times = in_turns([f for *_, forward, both in contestants for f in (forward, both)], args.rounds)
    print(
        f"B {args.batch}, H {args.heads}, N {args.tokens}, D {WIDTH}, float32, ms of one thread\n"
    )
    print("| op | rule | forward | forward and backward |\n|---|---|---|---|")
    plain = times[:2]
    for i, (name, rule, *_) in enumerate(contestants):
        pair = times[2 * i : 2 * i + 2]
        plain = pair if rule == PLAIN else plain
        cells = (
            f"{told(x)} [{statistics.median(x) / statistics.median(base):.2f}]"
            for x, base in zip(pair, plain, strict=True)
        )
        print(f"| {name} | {rule} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
