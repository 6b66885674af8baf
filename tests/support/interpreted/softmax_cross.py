"""More or fewer keys than queries, and fewer heads of them, in the Triton kernels of local and
sparse attention, run by Triton's interpreter on CPU tensors against float64.

tests/ops/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import pytest
import torch
from interpreter import interpreted
from proof import assert_accurate
from textbook.softmax import blocks, draw, in_window, ruled

from tab import BlockPattern
from tab.kernels import sparse as kernels
from tab.ops.local import local_fwd
from tab.ops.sparse import sparse_fwd

interpreted("local_fwd", "local_bwd", "sparse_fwd", "sparse_bwd")

SLOPES = torch.tensor([0.3, 0.02, 0.1, 0.5])


def local(n, m, *window, causal=False):
    def call(*x, key_mask=None, slopes=None, softcap=0.0):
        options = *window, 0, 0, causal, 0.4, softcap
        return local_fwd.apply("cuda", *x, key_mask, slopes, *options)

    return call, in_window(n, *window, causal, keys=m)


def sparse(n, m, heads, causal):
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(heads, -(-n // 20), -(-m // 20), generator=g) < 0.7
    pattern = BlockPattern.from_blocks(mask if heads > 1 else mask[0], 20, n, n_keys=m)

    def call(*x, key_mask=None, slopes=None, softcap=0.0):
        options = *pattern.tensors, key_mask, slopes, 20, causal, 0.4, softcap
        return sparse_fwd.apply("cuda", *x, *options)

    return call, blocks(pattern, causal)


def check(case, x, **told):
    call, seen = case
    truth = ruled(seen, **{**told, "softcap": told.get("softcap")}, scale=0.4)
    assert_accurate(lambda *x: call(*x, **told)[0], lambda *x: truth(*x)[0], x, names="o dq dk dv")


@pytest.mark.parametrize("n, m", [(1, 70), (70, 1), (33, 90), (90, 33), (40, 41)])
def test_lengths(n, m, monkeypatch):
    monkeypatch.setattr(kernels, "CUT", 2)
    x = draw(1, 2, n, 8, 12, keys=m)
    for case in (
        local(n, m, 9, 20), local(n, m, 40, 0), sparse(n, m, 1, False), sparse(n, m, 1, True),
    ):  # fmt: skip
        check(case, x)


def test_no_keys():
    for call, _ in (local(5, 0, 9, 20), sparse(5, 0, 1, True)):
        x = [t.requires_grad_() for t in draw(1, 2, 5, 8, keys=0)]
        o, lse = call(*x)
        dq, *_ = torch.autograd.grad(o.sum(), x)
        assert lse.isneginf().all() and not o.any() and not dq.any()


@pytest.mark.parametrize("n, m", [(37, 90), (90, 37)])
def test_rules(n, m):
    """A mask of keys, a cap and a bias by the distance of places."""
    keep = torch.stack([torch.arange(m) < m // 2, torch.arange(m) % 3 != 1])
    told = {"key_mask": keep, "slopes": SLOPES[:2], "softcap": 0.5}
    for case in (local(n, m, 9, 20), sparse(n, m, 1, True)):
        check(case, draw(2, 2, n, 8, keys=m), **told)


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("n, m", [(50, 50), (30, 70)])
def test_fewer_heads_of_keys(kv, n, m, monkeypatch):
    """A pattern for each head, and one that they share; of some lengths, in bfloat16 too."""
    monkeypatch.setattr(kernels, "CUT", 2)
    x, told = draw(1, 4, n, 8, 12, keys=m, kv=kv), {"slopes": SLOPES}
    for case in (local(n, m, 9, 20), sparse(n, m, 4, True), sparse(n, m, 1, False)):
        check(case, x, **told)
        if (n, kv) in ((50, 1), (30, 2)):
            check(case, [t.bfloat16() for t in x])


def test_fewer_heads_of_keys_in_a_batch():
    """Each entry has its own keys."""
    x = draw(2, 4, 20, 8, keys=30, kv=2)
    for case in (local(20, 30, 9, 20), sparse(20, 30, 4, True)):
        check(case, x, slopes=SLOPES)
