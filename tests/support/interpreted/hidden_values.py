"""What a hidden token holds reaches nobody: the Triton kernels, run by Triton's interpreter on CPU
tensors. Tiles that the edge of a window, or of the causal past, cuts are the ones to fail here.

tests/ops/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import math

import pytest
import torch
from interpreter import interpreted

from tab import BlockPattern, orthogonal_projection
from tab.kernels import _few, _performer_walk, _segments
from tab.ops import OPS

OPERATORS = ("linear", "gated_linear", "performer", "local", "sparse", "mla")
interpreted(*(f"{op}_{way}" for op in OPERATORS for way in ("fwd", "bwd")))

N, D = 70, 16  # tiles of 32 tokens, three of them, the last one cut
W = orthogonal_projection(20, D, generator=torch.Generator().manual_seed(0))
G = -torch.rand(1, 1, N, 1, generator=torch.Generator().manual_seed(2))
W_UK, W_UV = torch.randn(2, 1, D, D, generator=torch.Generator().manual_seed(1)) * 0.3
STEP = torch.arange(N)[None] - torch.arange(N)[:, None]  # key − query
CAUSAL = STEP <= 0


def pattern() -> BlockPattern:
    nb = -(-N // 40)  # blocks of 40 tokens are padded to tiles of 32
    return BlockPattern.from_blocks(torch.ones(nb, nb, dtype=torch.bool), 40, N)


def near(reach: int) -> torch.Tensor:
    """On a grid of 7 by 10."""
    row, col = torch.arange(N) // 10, torch.arange(N) % 10
    down, across = ((x[None] - x[:, None]).abs() <= reach for x in (row, col))
    return down & across


def op(name: str, *options):
    return lambda q, k, v: OPS[name].apply("cuda", q, k, v, *options)[0]


def latent(q, k, v):
    """Keys and values from one latent, k; v is the shared rotary key."""
    c, rotary = k[:, 0], v[:, 0]
    return OPS["mla_fwd"].apply("cuda", q, q, c, rotary, W_UK, W_UV, None, 0.3, True)[0]


CASES = {  # -> the attention, who sees whom (N, N)
    "line": (
        op("local_fwd", None, None, 9, 20, 0, 0, False, 0.3, 0.0),
        (STEP >= -9) & (STEP <= 20),
    ),
    "grid": (op("local_fwd", None, None, 2, 2, 7, 10, False, 0.3, 0.0), near(2)),
    "causal grid": (op("local_fwd", None, None, 2, 2, 7, 10, True, 0.3, 0.0), near(2) & CAUSAL),
    "sparse": (op("sparse_fwd", *pattern().tensors, None, None, 40, True, 0.3, 0.0), CAUSAL),
    "linear": (op("linear_fwd", None, None, None, 0, True, 0.0), CAUSAL),
    "gated": (op("gated_linear_fwd", G, None, None, 0.3), CAUSAL),
    "performer": (op("performer_fwd", W, *(None,) * 4, 0, True, 0.0), CAUSAL),
    "performer relu": (op("performer_fwd", W, *(None,) * 4, 1, True, 0.0), CAUSAL),
    "mla": (latent, CAUSAL),
}


def run(f, tensors, rows):
    """o, and the gradients of a loss on these rows of it."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    o = f(*leaves)
    o[:, :, rows].pow(2).sum().backward()
    return o.detach(), [x.grad for x in leaves]


# These are as few tokens as one program takes.
CASES |= {f"few: {name}": CASES[name] for name in ("line", "causal grid", "sparse")}
CASES |= {f"walk: {name}": CASES[name] for name in ("performer", "performer relu")}
# What hides a value is what a kernel selects, whatever version of Triton reads it; the other files
# show that each reads every kernel.
KINDS = [pytest.param(name, torch.float32, marks=pytest.mark.any_torch) for name in CASES]
KINDS += [(name, torch.bfloat16) for name in ("line", "linear", "gated")]


@pytest.mark.parametrize("name, dtype", KINDS)
def test_hidden(name, dtype, generator, monkeypatch):
    """In q, whose own row alone reads it; in k and in v, which all rows read that see the token."""
    monkeypatch.setattr(_segments, "SEGMENT", 64)
    if name.startswith("few"):
        monkeypatch.setattr(_few, "FEW", 128)
    if name.startswith("walk"):
        monkeypatch.setattr(_performer_walk, "WALKS", {"tf32x3"})
        monkeypatch.setattr(_performer_walk, "FEATURES", 16)
    f, sees = CASES[name]
    tensors = [torch.randn(1, 1, N, D, generator=generator).to(dtype) for _ in range(3)]
    for bad, value in ((13, math.nan), (45, math.inf)):
        for outside, letters in ((torch.arange(N) != bad, "q"), (~sees[:, bad], "kv")):
            o, grads = run(f, tensors, outside)
            # Rows that see the value have gradients of NaN, and so have the keys that they see.
            met = sees[~outside].any(0)
            for letter in letters:
                dirty = [x.clone() for x in tensors]
                dirty["qkv".index(letter)][:, :, bad, 2] = value
                given, given_grads = run(f, dirty, outside)
                assert torch.equal(given[:, :, outside], o[:, :, outside]), letter
                for a, b, spared in zip(given_grads, grads, (outside, ~met, ~met), strict=True):
                    assert torch.equal(a[:, :, spared], b[:, :, spared]), letter
                if math.isnan(value) or (letter == "v" and name != "mla"):
                    assert not given[:, :, ~outside].isfinite().all(-1).any(), letter
