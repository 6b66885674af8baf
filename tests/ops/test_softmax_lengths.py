"""torch.compile: one compilation with a fixed length, one that serves all others, as for SDPA."""

import pytest
import torch
from softmax_cases import FORMS
from torch._dynamo.testing import CompileCounterWithBackend

from tab import BlockPattern, local_attention, sparse_attention
from tab.functional import mla_attention
from tab.ops.mla_forms import max_logits

LENGTHS = (32, 36, 44, 48, 52, 60, 64, 68, 76, 84, 92)


def local(**options):
    return lambda q: local_attention(q, q * 2, q + 1, **options)


def mla(**options):
    one = torch.eye(4)[None]
    return lambda q: mla_attention(q, q * 2, q[:, 0] + 1, q[:, 0] - 1, one, one * 2, **options)


def grid(**options):
    return lambda q: local_attention(q, q * 2, q + 1, grid=(4, q.shape[2] // 4), **options)


FUNCTIONS = {
    "narrow": local(window=3),
    "as wide as some": local(window=(50, 3)),
    "wider than all": local(window=500),
    "wide and causal": local(window=(500, 50), causal=True),
    "a quarter of the tokens": lambda q: local_attention(q, q * 2, q + 1, window=q.shape[2] // 4),
    "grid": grid(window=2),
    "wide grid": grid(window=9, causal=True),
    "sparse": lambda q, pattern: sparse_attention(q, q * 2, q + 1, pattern),
    "max_logits": lambda q: max_logits(q, q * 2, 0.5, causal=True),
    **{f"mla {form}": mla(form=form, causal=True) for form in FORMS},
    "mla masked": lambda q: mla(key_mask=q[:, 0, :, 0] > -1, causal=True)(q).nan_to_num(),
    **{
        f"mla {form}, all outputs": mla(form=form, return_lse=True, return_max_logits=True)
        for form in FORMS
    },
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_two_compilations(name, train):
    f = FUNCTIONS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(f, backend=counter, fullgraph=True)
    for n in LENGTHS:
        more = (BlockPattern.bigbird(n, heads=1, block_size=4),) if name == "sparse" else ()
        q = torch.randn(1, 1, n, 4, requires_grad=train and name != "max_logits")
        for given, eager in zip(flat(compiled(q, *more)), flat(f(q, *more)), strict=True):
            torch.testing.assert_close(given, eager)
    assert counter.frame_count <= 2


def flat(out):
    return out if isinstance(out, tuple) else (out,)
