"""sanitized.py, which `make sanitize` runs, covers each kernel and tells right from wrong."""

import pytest
import torch
from sanitized import CASES, check, kernels

from tab.ops import OPS


def test_every_kernel_is_covered():
    assert set(kernels()) <= set(CASES)
    for name in CASES:
        assert name in OPS or f"{name}_fwd" in OPS


@pytest.mark.parametrize("name", kernels())
@pytest.mark.parametrize("flip", range(4))
def test_cases_run(name, flip):
    check(name, (1, 2, 33, 9, 5), torch.float32, flip)


def test_the_wrong_is_told(monkeypatch):
    monkeypatch.setitem(
        CASES, "wrong", lambda *a: (lambda backend, x: x + (backend == "cpp"), (a[5](1, 1, 2),), ())
    )
    with pytest.raises(SystemExit, match="off by 1"):
        check("wrong", (1, 1, 2, 1, 1), torch.float32, 0)
