"""H2O for a whole sequence, choices first and then attention to them, against the cache's steps."""

import pytest
import torch
from proof import outputs_and_gradients
from textbook.h2o import draw, naive
from torch.testing import assert_close

from tab import H2OCache, h2o_attention
from tab.ops.h2o_attend import h2o_attend
from tab.ops.h2o_choice import h2o_choose, h2o_choose_exact


def stream(q, k, v, *, heavy, recent, causal, block, key_mask=None):
    """Block by block through the cache, with the gradients that autograd finds."""
    cache, outputs = H2OCache(heavy=heavy, recent=recent), []
    for start in range(0, q.shape[2], block):
        now = slice(start, start + block)
        mask = None if key_mask is None else key_mask[:, now]
        x = (t[:, :, now] for t in (q, k, v))
        outputs.append(cache.step(*x, causal=causal, key_mask=mask))
    return torch.cat(outputs, 2)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("n, heavy, recent, block", [(20, 5, 3, 5), (21, 2, 1, 4), (33, 0, 1, 1)])
def test_the_choices_are_the_stream(generator, n, heavy, recent, block, causal):
    """With padding, and a batch entry of nothing but it."""
    inputs = draw(generator, b=3, n=n, dtype=torch.float64)
    mask = torch.rand(3, n, generator=generator) > 0.2
    mask[0] = False
    options = {"heavy": heavy, "recent": recent, "causal": causal, "block": block}
    for key_mask in (None, mask):
        given, wanted = (
            outputs_and_gradients(lambda *x: f(*x, key_mask=key_mask, **options), inputs)  # noqa: B023
            for f in (h2o_attention, stream)
        )
        assert_close(given, wanted)


@pytest.mark.parametrize("own", (False, True))
def test_opcheck(generator, own):
    q, k, v = (x.requires_grad_() for x in draw(generator, n=9))
    mask = torch.arange(9).expand(2, 9) < 7
    options = (2, 1, True)
    if own:
        arguments = (q.detach(), k.detach(), mask, *options, 2, 0.5)
        chosen = h2o_choose("auto", *arguments)
        torch.library.opcheck(h2o_choose.overload, arguments)
    else:
        arguments = (q.detach(), k.detach(), mask, *options, 0.5)
        chosen = h2o_choose_exact("auto", *arguments)
        torch.library.opcheck(h2o_choose_exact.overload, arguments)
    block = 2 if own else 1
    torch.library.opcheck(h2o_attend.overload, (q, k, v, chosen, mask, own, True, block, 0.5))


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
