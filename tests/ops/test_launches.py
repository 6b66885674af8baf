"""What the Triton launchers launch; nothing runs."""

from types import SimpleNamespace

import pytest
import torch

from tab.doctor.kernel_launches import launches, recorded
from tab.doctor.kernel_report import compiled

pytest.importorskip("triton")


def test_two_blocks_of_the_backward_of_linear():
    """Of bfloat16 at the sizes of CIFAR-10 on Hopper, which the limit of registers is for."""
    launch = next(
        launch
        for launch in launches(90)["linear"]
        if launch.kernel.__name__ == "linear_fused_backward" and "*bf16" in launch.types
    )
    row = compiled("linear", launch, 90)
    assert row["warps"] == 16 and row["spilled"] == 0


def test_a_grid_that_cuda_does_not_take(monkeypatch):
    from tab.kernels import _launch

    with pytest.raises(ValueError, match=r"f: a grid of 9 × 65536 programs.*fewer tokens"):
        _launch.launch(SimpleNamespace(__name__="f"), (9, 65536), torch.empty(1))


@pytest.mark.parametrize("d, causal, backward", [(16, 0, 3), (16, 1, 5), (80, 0, 6), (80, 1, 8)])
def test_launches_of_linear(d, causal, backward):
    """What all tokens see stands in the forward's state, and is not summed again; of a head of one
    tile each token is read once."""
    from tab.kernels import linear_backward

    q = torch.empty(1, 2, 1024, d, dtype=torch.bfloat16, device="meta")
    s, z = (torch.empty(1, 2, *n, device="meta") for n in ((d, d), (d,)))
    given = q, None, None, q, q, q, q, s, z, None, None, None, 0, bool(causal), 0.0
    assert len(recorded(linear_backward.backward, *given)[0]) == backward


@pytest.mark.parametrize("n, backward", [(64, 1), (65, 2)])
def test_launches_of_sparse(n, backward):
    """Few tokens are one tile, whatever the blocks."""
    from tab.kernels import sparse, sparse_backward

    q, lse = (torch.empty(1, 2, n, *d, device="meta") for d in ((16,), ()))
    pattern = [torch.empty(*size, dtype=torch.int32, device="meta") for size in ((1, 17), (99,))]
    options = *pattern, *pattern, None, None, 5, False, 1.0, 0.0
    assert len(recorded(sparse.forward, q, q, q, *options)[0]) == 1
    assert len(recorded(sparse_backward.backward, q, q, q, q, q, lse, *options)[0]) == backward


FULL, HALF = torch.float32, torch.bfloat16
LAUNCHES = [  # B, N, causal, type -> launches forward, backward
    (1, 64, False, FULL, 1, 1),
    (512, 1024, False, FULL, 1, 1),  # heads fill the GPU
    (1, 1024, False, FULL, 3, 4),
    (1, 1024, True, FULL, 3, 6),
    (1, 1024, True, HALF, 3, 5),  # dq and the states of dT in one walk
]


@pytest.mark.parametrize("b, n, causal, dtype, forward, backward", LAUNCHES)
def test_launches_of_performer(b, n, causal, dtype, forward, backward):
    from tab.kernels import performer, performer_backward

    w = torch.empty(32, 16, device="meta")
    q = torch.empty(b, 2, n, 16, dtype=dtype, device="meta")
    options = *(None,) * 4, 0, causal
    assert len(recorded(performer.forward, q, q, q, w, *options, 0.0)[0]) == forward
    s, z, lse = w.new_empty(b, 2, 32, 16), w.new_empty(b, 2, 32), w.new_empty(b, 2, n)
    given = q, None, None, q, q, q, w, q, s, z, z, lse
    assert len(recorded(performer_backward.backward, *given, *options)[0]) == backward
