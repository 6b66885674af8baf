"""One sequence on several threads: the C++ kernels cut it into segments (csrc/cpu/core/segments.h),
sum their states, and give each what it starts from. In float64, where that must not be seen."""

import pytest
import torch

import tab
from tab.ops.linear import linear_fwd

pytestmark = pytest.mark.skipif(
    linear_fwd.why_not("cpp") is not None, reason=str(linear_fwd.why_not("cpp"))
)
M, N, D, DV = 20, 700, 9, 12


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("first", (False, True))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("name", ("elu1", "identity", "softmax", "relu"))
def test_segments(name, causal, first, threads, generator):
    """linear under a feature map, performer under a kernel; gradients of output and state."""

    def number(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    performer = name in ("softmax", "relu")
    w = number(M, D) - 0.5
    mask = number(1, N) > 0.2
    x = [number(1, 2, N, size) for size in (D, D, DV)]
    rows = M if performer else D
    state = [number(1, 2, rows, DV), number(1, 2, rows)] if first else []
    shift = [torch.zeros(1, 2, M, dtype=torch.float64)] if performer and first else []

    def results(backend):
        leaves = [y.clone().requires_grad_() for y in x + state]
        options = {"causal": causal, "key_mask": mask, "return_state": True, "backend": backend}
        options["initial_state"] = (*leaves[3:], *shift) if first else None
        if performer:
            o, (s, z, c) = tab.performer_attention(*leaves[:3], w, kernel=name, **options)
            s, z = s * c.exp()[..., None], z * c.exp()  # against shifts of their own
        else:
            o, (s, z) = tab.linear_attention(*leaves[:3], feature_map=name, **options)
        loss = o.sin().sum() + s.log1p().sum() + z.log1p().sum()
        return o, s, z, *torch.autograd.grad(loss, leaves)

    for given, wanted in zip(results("cpp"), results("reference"), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-11)
