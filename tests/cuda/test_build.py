"""CUDA C++ without a GPU: what the compiled kernels take. Their numbers: test_linear.py …"""

import re

import pytest
from paths import ROOT

from tab.doctor import kernel_report
from tab.ops import OPS


def test_resources():
    """The kernels in the built library: all types and architectures, nothing spilled, they fit."""
    rows = kernel_report.built()
    if not rows:
        pytest.skip("tab._C_cuda was not built")
    sources = [path.read_text() for path in (ROOT / "csrc/cuda").rglob("*.cuh")]
    problems = re.findall(r"^struct (\w+(?:Forward|Backward)) ", "\n".join(sources), re.M)
    assert problems and {row["kernel"] for row in rows} == {f"cuda {name}" for name in problems}
    assert {f"{op}_fwd" for row in rows for op in row["op"].split()} <= set(OPS)
    assert {row["config"].split()[0] for row in rows} == {"float", "__half", "__nv_bfloat16"}
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= row["limit"], row
        assert 0 < row["registers"] <= 255, row
