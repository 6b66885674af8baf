"""Grouped and multi-query attention: k and v with fewer heads than q, against their repetition."""

from functools import partial

import pytest
import torch
from backends import needs_cpp, reference_and_cpp
from proof import LAYOUTS, Largest, assert_accurate, layout, outputs_and_gradients
from tasks import threads
from textbook.grouped import given, repeated
from textbook.softmax import blocks, in_window, naive

from tab import BlockPattern, local_attention, sparse_attention
from tab.ops import OPS
from tab.ops._op import choose

BACKENDS = reference_and_cpp("local_fwd")
NAMES = "o dq dk dv"


def case(name, n, h, causal, **options):
    """-> the call, and its truth."""
    options["causal"] = causal
    if name == "local":
        call = partial(local_attention, window=(9, 4), **options)
        return call, repeated(naive(in_window(n, 9, 4, causal)))
    if name == "grid":
        call = partial(local_attention, window=1, grid=(n // 5, 5), **options)
        return call, repeated(naive(in_window(n, 1, 1, causal, 5)))
    pattern = BlockPattern.bigbird(n, heads=h, block_size=8, num_random=1)  # another for each head
    return partial(sparse_attention, pattern=pattern, **options), repeated(
        naive(blocks(pattern, causal))
    )


@pytest.mark.each_isa
@pytest.mark.parametrize("name", ["local", "grid", "sparse"])
@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (6, 2)], ids=str)
@pytest.mark.parametrize("n", [1, 70, 150])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_repeated_heads(name, heads, n, backend):
    n += -n % 5
    for causal in (False, True):
        call, truth = case(name, n, heads[0], causal, backend=backend)
        assert_accurate(call, truth, given(2, *heads, n, 8, 12), names=NAMES)


@pytest.mark.parametrize("name", ["local", "sparse"])
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("d", [5, 16])  # whole vectors are read where they lie, others are copied
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(name, how, d, backend):
    call, truth = case(name, 65, 4, False, backend=backend)
    assert_accurate(call, truth, [layout(x, how) for x in given(2, 4, 2, 65, d)], names=NAMES)


@pytest.mark.parametrize("name", ["local", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(name, dtype, backend):
    call, truth = case(name, 66, 4, True, backend=backend)
    assert_accurate(call, truth, [x.to(dtype) for x in given(1, 4, 1, 66, 8)], names=NAMES)


@needs_cpp("local_fwd")
@pytest.mark.parametrize("name", ["local", "sparse"])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_any_number_of_threads(name, count):
    """Segments of a group's strips: of one head of q, and across two."""
    call, truth = case(name, 600, 6, False, backend="cpp")
    inputs = given(1, 6, 2, 600, 16)
    with threads(count):
        assert_accurate(call, truth, inputs, names=NAMES)
        once, again = (outputs_and_gradients(call, inputs) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("name", ["local", "sparse"])
def test_derivatives_of_any_order(name):
    call, _ = case(name, 10, 4, True, return_lse=True)
    inputs = [x.requires_grad_() for x in given(1, 4, 2, 10, 2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@needs_cpp("local_fwd")
@pytest.mark.parametrize("name", ["local", "sparse"])
def test_nothing_is_expanded(name):
    """No tensor of H heads but o and dq, and none of more numbers than these."""
    call, _ = case(name, 64, 16, False, backend="cpp")
    inputs = [x.requires_grad_() for x in given(1, 16, 1, 64, 8)]
    with Largest() as largest:
        grads = torch.autograd.grad(call(*inputs).sum(), inputs)
    assert [x.shape[1] for x in grads] == [16, 1, 1]
    assert largest.numel == inputs[0].numel()


@pytest.mark.parametrize("name", ["local", "sparse"])
def test_compiled_exported_and_without_memory(name):
    call, _ = case(name, 20, 4, True)

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return call(q, k, v)

    inputs = given(2, 4, 2, 20, 4, 6)
    meta = call(*(x.to("meta") for x in inputs))
    assert meta.shape == (2, 4, 20, 6) and meta.transpose(1, 2).is_contiguous()
    exported = torch.export.export(Attention(), inputs).module()
    torch.testing.assert_close(exported(*inputs), call(*inputs))
    compiled = torch.compile(Attention(), backend="aot_eager", fullgraph=True)
    for x, y in zip(*(outputs_and_gradients(f, inputs) for f in (compiled, call)), strict=True):
        torch.testing.assert_close(x, y)


def test_what_a_backend_does_not_take():
    """Kernels whose heads each have a key head say so; others are asked about q and k."""
    q, k, _ = given(1, 4, 2, 8, 4)
    for name in ("local_fwd", "sparse_fwd"):
        assert OPS[name].takes["cuda"](q, q) is None
        assert (
            OPS[name].takes["cuda"](q, k)
            == "it takes as many heads of k and v as of q, got 2 and 4"
        )
        assert choose("reference", OPS[name], q, k) == "reference"


def test_bad_heads():
    q, k, v = given(1, 4, 2, 8, 4)
    for bad, message in (
        ((q, k[:, :0], v[:, :0]), "at least one head"),
        ((q, torch.cat([k, k[:, :1]], 1), v), r"divides the 4 of q; got .* k \(1, 3, 8, 4\)"),
        ((q, k, v[:, :1]), "one shape, v with the same B, H, N, or both with fewer heads than q"),
        ((k, q, q), "divides the 2 of q"),
    ):
        with pytest.raises(ValueError, match=message):
            local_attention(*bad, window=1)
