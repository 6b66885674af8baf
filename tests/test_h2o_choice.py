"""H2O as a GPU does it: choices first, then one attention to the chosen, against the stream."""

import pytest
import torch
from h2o_textbook import draw, naive
from proof import outputs_and_gradients
from torch.testing import assert_close

from tab import h2o_attention
from tab.ops.h2o_choice import attend_chosen, h2o_choose


def in_two_steps(q, k, v, *, heavy, recent, causal, block, key_mask=None):
    scale = q.shape[-1] ** -0.5
    options = heavy, recent, causal, block, scale
    chosen = h2o_choose("auto", q.detach(), k.detach(), key_mask, *options)
    return attend_chosen(q, k, v, chosen, key_mask, *options[2:])


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("n, heavy, recent, block", [(20, 5, 3, 5), (21, 2, 1, 4), (33, 0, 1, 1)])
def test_two_steps_are_the_stream(generator, n, heavy, recent, block, causal):
    """A mask while N is small, then copies of the chosen keys; padding, and nothing but it."""
    inputs = draw(generator, b=3, n=n, dtype=torch.float64)
    mask = torch.rand(3, n, generator=generator) > 0.2
    mask[0] = False
    options = {"heavy": heavy, "recent": recent, "causal": causal, "block": block}
    for key_mask in (None, mask):
        given, wanted = (
            outputs_and_gradients(lambda *x: f(*x, key_mask=key_mask, **options), inputs)  # noqa: B023
            for f in (in_two_steps, h2o_attention)
        )
        assert_close(given, wanted)


@pytest.mark.parametrize("n", (16, 40))
def test_two_steps_compile(generator, n):
    options = {"heavy": 2, "recent": 2, "causal": True, "block": 4}
    inputs = draw(generator, n=n)
    f = lambda *x: in_two_steps(*x, **options)  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_close(outputs_and_gradients(compiled, inputs), outputs_and_gradients(f, inputs))


def test_choose_opcheck(generator):
    q, k, _ = draw(generator, n=9)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(h2o_choose.overload, (q, k, None, 2, 1, True, 2, 0.5), test_utils=tests)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(
    "n, heavy, recent, block", [(64, 16, 16, 16), (200, 5, 4, 20), (9, 1, 0, 1)]
)
def test_gpu(generator, n, heavy, recent, block, causal, dtype):
    """The float64 stream's values and gradients; the choices in a CUDA graph too."""
    assert h2o_choose.why_not("triton") is None, h2o_choose.why_not("triton")
    options = {"heavy": heavy, "recent": recent, "causal": causal, "block": block}
    # Large scores: no choice turns on a rounding.
    inputs = [2 * x.to(dtype) for x in draw(generator, n=n, d=32, dv=32)]
    exact = outputs_and_gradients(lambda *x: naive(*x, **options), [x.double() for x in inputs])
    on_gpu = [x.cuda() for x in inputs]
    f = lambda *x: h2o_attention(*x, **options)  # noqa: E731
    given = outputs_and_gradients(f, on_gpu)
    bound = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    scale = max(x.abs().max() for x in exact)
    for x, y in zip(given, exact, strict=True):
        assert (x.double().cpu() - y).abs().max() <= bound * scale
    choose = lambda: h2o_choose("auto", *on_gpu[:2], None, *options.values(), 0.2)  # noqa: E731
    chosen = choose()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = choose()
    graph.replay()
    assert torch.equal(captured, chosen)
