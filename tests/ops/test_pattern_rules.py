"""Patterns by a rule: each is its formula, token by token, and attends as masked SDPA does."""

import pytest
import torch
from proof import assert_accurate
from textbook.softmax import blocks, draw, naive

from tab import BlockPattern, sparse_attention

# name, its options, whether block row i sees block column j: the formulas of their papers
RULES = [
    ("sliding_window", {"window": 1}, lambda i, j: j == i),
    ("sliding_window", {"window": 3, "sinks": 2}, lambda i, j: j <= i and (j > i - 3 or j < 2)),
    ("sliding_window", {"window": 99, "sinks": 99}, lambda i, j: j <= i),
    ("dilated", {"window": 3, "dilation": 1}, lambda i, j: abs(i - j) <= 1),
    ("dilated", {"window": 5, "dilation": 3}, lambda i, j: j in (i - 6, i - 3, i, i + 3, i + 6)),
    ("dilated", {"window": 99, "dilation": 2}, lambda i, j: (i - j) % 2 == 0),
    ("strided", {"stride": 1}, lambda i, j: j <= i),
    ("strided", {"stride": 3}, lambda i, j: j <= i and (i - j < 3 or (i - j) % 3 == 0)),
    ("strided", {"stride": 99}, lambda i, j: j <= i),
    ("fixed", {"stride": 3}, lambda i, j: j <= i and (i // 3 == j // 3 or j % 3 == 2)),
    ("fixed", {"stride": 4, "summary": 2}, lambda i, j: j <= i and (i // 4 == j // 4 or j % 4 > 1)),
    ("fixed", {"stride": 3, "summary": 0}, lambda i, j: j <= i and i // 3 == j // 3),
    ("fixed", {"stride": 99}, lambda i, j: j <= i),
]
IDS = [f"{name}-{'-'.join(map(str, options.values()))}" for name, options, _ in RULES]


@pytest.mark.parametrize(("name", "options", "seen"), RULES, ids=IDS)
@pytest.mark.parametrize(("n", "block_size"), [(0, 4), (1, 4), (44, 4), (45, 4), (13, 1)])
def test_formula(name, options, seen, n, block_size):
    pattern = getattr(BlockPattern, name)(n, block_size=block_size, **options)
    nb = -(-n // block_size)
    want = torch.tensor([[seen(i, j) for j in range(nb)] for i in range(nb)], dtype=torch.bool)
    assert torch.equal(pattern.to_blocks()[0], want.view(nb, nb))
    assert pattern.heads is None and pattern.to_dense().shape == (1, n, n)


@pytest.mark.parametrize(("name", "options", "seen"), RULES[1::3], ids=IDS[1::3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_attends_as_masked_sdpa(name, options, seen, causal, backend):
    pattern = getattr(BlockPattern, name)(45, block_size=4, **options)
    mask = blocks(pattern, causal)

    def sdpa(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def sparse(q, k, v):
        return sparse_attention(q, k, v, pattern, causal=causal, backend=backend)

    inputs = draw(2, 2, 45, 8)
    assert_accurate(sparse, naive(mask), inputs, names="o dq dk dv")
    torch.testing.assert_close(sparse(*inputs), sdpa(*inputs))


def test_streaming_is_exact_by_tokens():
    """In blocks of one token: the last 8, and the first 4."""
    pattern = BlockPattern.sliding_window(60, window=8, sinks=4, block_size=1)
    i, j = torch.arange(60)[:, None], torch.arange(60)
    assert torch.equal(pattern.to_dense()[0], (j <= i) & ((i - j < 8) | (j < 4)))


def test_long_patterns_are_small():
    for name, options in (
        ("sliding_window", {"window": 16, "sinks": 1}), ("dilated", {"window": 3, "dilation": 9}),
        ("strided", {"stride": 50}), ("fixed", {"stride": 50}),
    ):  # fmt: skip
        pattern = getattr(BlockPattern, name)(160_000, **options)
        assert pattern.col.numel() < 2500 * 120  # of 2500² blocks


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sliding_window", {"window": 0}, "sliding_window wants window ≥ 1, got 0; nearest: 1"),
        ("sliding_window", {"window": 1, "sinks": -1}, "sinks ≥ 0, got -1; nearest: 0"),
        ("dilated", {"window": 4, "dilation": 1}, "odd window.*got 4; nearest: 3 or 5"),
        ("dilated", {"window": 3, "dilation": 0}, "dilation ≥ 1, got 0"),
        ("strided", {"stride": 0}, "strided wants stride ≥ 1, got 0"),
        ("fixed", {"stride": 2, "summary": 3}, "summary ≤ stride = 2, got 3; nearest: 2"),
        ("fixed", {"stride": 2, "block_size": 0}, "block_size ≥ 1; got 64 and 0"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(BlockPattern, name)(64, **options)
