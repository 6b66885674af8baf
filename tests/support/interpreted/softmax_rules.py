"""Key masks, softcap and ALiBi in the Triton kernels of local and sparse attention, run by Triton's
interpreter on CPU tensors against float64.

tests/ops/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import pytest
import torch
from interpreter import interpreted
from proof import assert_accurate
from textbook.softmax import blocks, draw, in_window, ruled

from tab import BlockPattern
from tab.kernels import _few
from tab.kernels import sparse as kernels
from tab.ops.local import local_fwd
from tab.ops.sparse import sparse_fwd

interpreted("local_fwd", "local_bwd", "sparse_fwd", "sparse_bwd")

N = 70  # tiles of 32 tokens
SLOPES = torch.tensor([0.3, 0.02])
MASK = torch.stack([torch.arange(N) < 40, torch.arange(N) % 3 != 1])
# A pattern shared by the heads, with a row that sees nothing.
BLOCKS = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
PATTERN = BlockPattern.from_blocks(BLOCKS, 20, N)


def local(*window, causal=False, grid=(0, 0)):
    def call(*x, key_mask, slopes, softcap):
        options = *window, *grid, causal, 0.4, softcap
        return local_fwd.apply("cuda", *x, key_mask, slopes, *options)

    return call, in_window(N, *window, causal, grid[1])


def sparse(causal):
    def call(*x, key_mask, slopes, softcap):
        options = *PATTERN.tensors, key_mask, slopes, 20, causal, 0.4, softcap
        return sparse_fwd.apply("cuda", *x, *options)

    return call, blocks(PATTERN, causal)


CASES = {
    "line": local(9, 20),
    "far": local(69, 69),
    "causal grid": local(2, 2, causal=True, grid=(7, 10)),
    "blocks": sparse(False),
    "causal blocks": sparse(True),
}
CASES |= {f"few: {name}": CASES[name] for name in ("line", "causal grid", "causal blocks")}


@pytest.fixture(autouse=True)
def one_tile(request, monkeypatch):
    """These are as few tokens as one program takes, where the name says so."""
    if request.node.callspec.params["name"].startswith("few"):
        monkeypatch.setattr(_few, "FEW", 128)


RULES = [
    {"key_mask": MASK, "slopes": None, "softcap": 0.0},
    {"key_mask": None, "slopes": SLOPES, "softcap": 0.0},
    {"key_mask": MASK, "slopes": SLOPES, "softcap": 0.5},
]


def at_least(told) -> tuple[int, int]:
    """Batch entries and heads: two where the rule is another one for each."""
    return 2 - (told["key_mask"] is None), 2 - (told["slopes"] is None)


@pytest.mark.parametrize("told", RULES)
@pytest.mark.parametrize("name", CASES)
def test_against_the_textbook(name, told, monkeypatch):
    monkeypatch.setattr(kernels, "CUT", 2)
    call, seen = CASES[name]
    truth = ruled(seen, **{**told, "softcap": told["softcap"] or None}, scale=0.4)

    x = draw(*at_least(told), N, 8, 12)
    assert_accurate(lambda *x: call(*x, **told)[0], lambda *x: truth(*x)[0], x, names="o dq dk dv")
    lse, want = call(*x, **told)[1], truth(*(t.double() for t in x))[1]
    torch.testing.assert_close(lse.masked_fill(lse.isneginf(), 0.0), want.float())


@pytest.mark.parametrize("dtype, d, dv", [(torch.bfloat16, 16, 16), (torch.float32, 80, 130)])
@pytest.mark.parametrize("name", ["line", "causal blocks"])
def test_types_and_wide_heads(name, dtype, d, dv):
    call, seen = CASES[name]
    x, told = [t.to(dtype) for t in draw(2, 2, N, d, dv)], RULES[2]
    truth = ruled(seen, **told, scale=0.4)
    assert_accurate(lambda *x: call(*x, **told)[0], lambda *x: truth(*x)[0], x, names="o dq dk dv")


WIDE = [(name, 80, torch.inf) for name in ("line", "causal blocks", "few: causal blocks")]


@pytest.mark.any_torch
@pytest.mark.parametrize("name, d, value", [*((name, 8, torch.nan) for name in CASES), *WIDE])
def test_what_a_masked_token_holds(name, d, value, monkeypatch):
    """In q, k and v at once: real tokens' outputs and all gradients are as without, to the bit."""
    monkeypatch.setattr(kernels, "CUT", 2)
    told, results = {**RULES[2], "slopes": SLOPES[:1]}, []
    for dirty in (False, True):
        x = [t.requires_grad_() for t in draw(2, 1, N, d)]
        given = [t.masked_fill(~MASK[:, None, :, None], value) for t in x] if dirty else x
        o = CASES[name][0](*given, **told)[0].transpose(1, 2)[MASK]
        results.append((o, *torch.autograd.grad(o.square().sum(), x)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
