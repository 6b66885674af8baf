"""A backend that is asked for by name runs, or says why not and what to do: it never falls back."""

import pytest
import torch
from torch.autograd import forward_ad

import tab
from tab.ops import OPS

WHY_NOT = OPS["linear_fwd"].why_not("cpp")
needs_cpp = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
W = tab.orthogonal_projection(12, 8, generator=torch.Generator().manual_seed(0))
PATTERN = tab.BlockPattern.bigbird(9, heads=2, block_size=4)
ATTENTIONS = {
    "linear": lambda x, b: tab.linear_attention(x, x, x, backend=b),
    "performer": lambda x, b: tab.performer_attention(x, x, x, W, backend=b),
    "local": lambda x, b: tab.local_attention(x, x, x, window=2, backend=b),
    "sparse": lambda x, b: tab.sparse_attention(x, x, x, PATTERN, backend=b),
    # Weights as small as a model's: with x itself gradients are sums up to 29 that cancel, which
    # float32 rounds by 1e-5, the reference's as well.
    "mla": lambda x, b: tab.mla_attention(
        x, x, x[:, 0], x[:, 0], x[0, :, :8] / 4, x[0, :, :8] / 4, backend=b
    ),
    "decode": lambda x, b: tab.mla_decode(
        x[:, :, 0], x[:, :, 0], x[:, 0].repeat(1, 1, 2), torch.full((1,), 9), x[0, :, :8],
        x[0, :, :8], backend=b,
    )[0],
}  # fmt: skip
each = pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)


def draw() -> torch.Tensor:
    return torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0))


@needs_cpp
@each
def test_a_named_kernel_is_refused_under_transforms(attention):
    x = draw()
    refused = pytest.raises(
        RuntimeError, match=r"backend='cpp' of .*torch\.func.*reference; use backend=\"auto\""
    )
    with refused:
        torch.func.grad(lambda x: attention(x, "cpp").sum())(x)
    with refused:
        torch.vmap(lambda x: attention(x, "cpp"))(x[None])
    with refused, forward_ad.dual_level():
        attention(forward_ad.make_dual(x, x), "cpp")
    assert attention(x, "cpp").isfinite().all()


@needs_cpp
@each
def test_samples_have_gradients_with_auto_and_the_reference(attention):
    x = draw().requires_grad_()
    (want,) = torch.autograd.grad(attention(x, "cpp").sum(), x)
    for backend in ("auto", "reference"):
        samples = x.detach().expand(3, -1, -1, -1)[:, None]
        each = torch.vmap(torch.func.grad(lambda x: attention(x, backend).sum()))(samples)  # noqa: B023
        torch.testing.assert_close(each, want.expand_as(each))


@needs_cpp
def test_the_way_out_leads_past_a_default():
    """Where the default is a kernel, "auto" would be that kernel again."""
    x = draw()

    def grad():
        return torch.func.grad(lambda x: ATTENTIONS["linear"](x, "auto").sum())(x)

    with tab.use_backend("cpp"), pytest.raises(RuntimeError, match='use backend="reference"'):
        grad()
    with tab.use_backend("reference"):
        grad()
    with tab.use_backend("triton"), pytest.raises(RuntimeError, match='use backend="reference"'):
        ATTENTIONS["linear"](x, "auto")


def test_names():
    for call in (lambda: tab.use_backend("gpu").__enter__(), lambda: ATTENTIONS["mla"](draw(), "")):
        with pytest.raises(ValueError, match="choose one of auto, reference, cpp, triton, cuda"):
            call()
