"""Packed batches in graphs: compiled once for all lengths, exported, checked by PyTorch; and what
they are said to cost."""

from functools import partial

import pytest
import torch
from packs import DV, LENGTHS, NAMES, H, call, cu, draw, loop, results
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from tab.ops import OPS

T = sum(LENGTHS)
each = pytest.mark.parametrize("name", NAMES)


@each
def test_one_compilation_for_all_lengths(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    causal = call(name, causal=True)
    f = lambda ends, *x: causal(*x, cu_seqlens=ends)  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    x = draw(name, T)
    for lengths in (LENGTHS, (1, 0, 2, 4, 70, 1, 5, 0), (10, 10, 10, 10, 10, 10, 10, 13)):
        assert_close(
            results(partial(compiled, cu(lengths)), x), results(partial(f, cu(lengths)), x)
        )
    assert counter.frame_count == 1


@each
def test_exported(name):
    attention = call(name)

    class Attention(torch.nn.Module):
        def forward(self, ends, *x):
            return attention(*x, cu_seqlens=ends)

    x = [t.detach() for t in draw(name, T)]
    exported = torch.export.export(Attention(), (cu(LENGTHS), *x)).module()
    ends = cu((83, 0, 0, 0, 0, 0, 0, 0))
    assert_close(exported(ends, *x), call(name, cu_seqlens=ends)(*x))


@each
def test_the_operators(name):
    """What PyTorch asks of one, and shapes without memory."""
    x = draw(name, T)
    seen = []
    op = OPS[f"{name}_packed_fwd"]
    run, op.apply = op.apply, lambda *a: seen.append(a[1:]) or run(*a)
    try:
        f = call(name, cu_seqlens=cu(LENGTHS))
        f(*x)
        meta = call(name, cu_seqlens=cu(LENGTHS).to("meta"))
        if name != "performer":
            assert meta(*(t.to("meta") for t in x)).shape == (1, H, T, DV)
    finally:
        del op.apply
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(op.overload, seen[0], test_utils=tests)


@pytest.mark.parametrize("name", ["linear", "local", "mla"])
def test_flops_are_those_of_the_sequences(name):
    def count(f):
        mapping = {getattr(torch.ops.tab, key): op.flops for key, op in OPS.items()}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            torch.autograd.grad(f(*x).sum(), x)
        return counter.get_total_flops()

    x = draw(name, T)
    lengths = (5, 3, 3, 71, 1)
    alone = call(name)
    many = count(lambda *x: loop(name, alone, x, lengths)[0])
    assert count(call(name, cu_seqlens=cu(lengths))) == many > 0
