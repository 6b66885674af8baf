"""CUDA C++ without a GPU: what the compiled kernels take. Their numbers: test_linear.py …"""

import pytest

from tab.doctor import kernel_report

DIRECTIONS = "Forward", "Backward"


def test_resources():
    """The kernels in the built library: all types and architectures, nothing spilled, they fit."""
    rows = kernel_report.built()
    if not rows:
        pytest.skip("tab._C_cuda was not built")
    assert {row["kernel"] for row in rows} == {
        f"cuda {op}{direction}" for op in kernel_report.CUDA_OPS for direction in DIRECTIONS
    }
    assert {row["config"].split()[0] for row in rows} == {"float", "__half", "__nv_bfloat16"}
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= row["limit"], row
        assert 0 < row["registers"] <= 255, row
