"""What the Triton launchers launch, and how many warps a multiprocessor holds; nothing runs."""

from types import SimpleNamespace

import pytest
import torch

from tab.doctor.kernel_launches import launches, recorded
from tab.doctor.kernel_report import compiled, resident

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "arch, registers, shared, warps, blocks",
    [
        (90, 133, 28672, 8, 1),  # 136 registers of 256 threads: the second block lacks 4 KiB
        (90, 122, 28672, 8, 2),
        (90, 32, 0, 4, 16),  # as many warps as there are places
        (90, 64, 113 * 1024, 4, 2),  # memory to the last byte
        (90, 64, 113 * 1024 + 1, 4, 1),
        (80, 255, 98304, 8, 1),
    ],
)
def test_resident_warps(arch, registers, shared, warps, blocks):
    assert resident(arch, registers, shared, warps) == warps * blocks


def test_two_blocks_of_the_backward_of_linear():
    """Of bfloat16 at the sizes of CIFAR-10 on Hopper, which the limit of registers is for."""
    launch = next(
        launch
        for launch in launches(90)["linear"]
        if launch.kernel.__name__ == "linear_fused_backward" and "*bf16" in launch.types
    )
    row = compiled("linear", launch, 90)
    assert row["warps"] == 16 and row["spilled"] == 0


def test_rows_are_kept(monkeypatch, tmp_path):
    """The next report compiles nothing; after another source or setting it does."""
    from tab.doctor import kernel_kept, kernel_report

    asked = []

    def compiled(op, launch, arch):
        asked.append(launch.kernel.__name__)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return {"kernel": launch.kernel.__name__, "arch": arch}

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_report, "compiled", compiled)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):  # the first row is kept
        kernel_report.report_rows((90,), {"h2o"})
    rows = kernel_report.report_rows((90,), {"h2o"})
    assert len(rows) == 4 and len(asked) == 5
    assert kernel_report.report_rows((90,), {"h2o"}) == rows and len(asked) == 5
    kernel_report.report_rows((80,), {"h2o"})
    assert len(asked) == 9
    monkeypatch.setattr(kernel_kept, "_state", lambda: "other sources")
    kernel_report.report_rows((90,), {"h2o"})
    assert len(asked) == 13
    (tmp_path / "cache" / "tab-kernel-report-other sources.json").write_text("{")
    kernel_report.report_rows((90,), {"h2o"})  # a broken file is made anew
    assert len(asked) == 17


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
    assert len(recorded(linear_backward.backward, *given)) == backward


@pytest.mark.parametrize("n, backward", [(64, 1), (65, 2)])
def test_launches_of_sparse(n, backward):
    """Few tokens are one tile, whatever the blocks."""
    from tab.kernels import sparse, sparse_backward

    q, lse = (torch.empty(1, 2, n, *d, device="meta") for d in ((16,), ()))
    pattern = [torch.empty(*size, dtype=torch.int32, device="meta") for size in ((1, 17), (99,))]
    options = *pattern, *pattern, None, None, 5, False, 1.0, 0.0
    assert len(recorded(sparse.forward, q, q, q, *options)) == 1
    assert len(recorded(sparse_backward.backward, q, q, q, q, q, lse, *options)) == backward


LAUNCHES = [  # B, N, causal -> launches forward, backward
    (1, 64, False, 1, 1),
    (512, 1024, False, 1, 1),  # heads fill the GPU
    (1, 1024, False, 3, 4),
    (1, 1024, True, 3, 6),
]


@pytest.mark.parametrize("b, n, causal, forward, backward", LAUNCHES)
def test_launches_of_performer(b, n, causal, forward, backward):
    from tab.kernels import performer, performer_backward

    q, w = torch.empty(b, 2, n, 16, device="meta"), torch.empty(32, 16, device="meta")
    options = *(None,) * 4, 0, causal
    assert len(recorded(performer.forward, q, q, q, w, *options, 0.0)) == forward
    s, z, lse = q.new_empty(b, 2, 32, 16), q.new_empty(b, 2, 32), q.new_empty(b, 2, n)
    given = q, None, None, q, q, q, w, q, s, z, z, lse
    assert len(recorded(performer_backward.backward, *given, *options)) == backward
