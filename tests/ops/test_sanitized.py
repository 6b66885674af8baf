"""sanitized.py, which `make sanitize` runs, covers each kernel and tells right from wrong."""

from itertools import combinations, product

import pytest
import torch
from proof import LAYOUTS
from sanitized import CASES, SHAPES, TOLERANCE, cases, check, kernels

from tab.ops import OPS


def test_every_kernel_is_covered():
    assert set(kernels()) <= set(CASES)
    for name in CASES:
        assert name in OPS or f"{name}_fwd" in OPS


@pytest.mark.parametrize("name", kernels())
@pytest.mark.parametrize("flip", range(4))
def test_cases_run(name, flip):
    check(name, (1, 2, 33, 9, 5), torch.float32, LAYOUTS[flip], flip)


def test_any_two_choices_meet():
    """A shape and a dtype, a dtype and a layout, a layout and an option …"""
    kinds = SHAPES, TOLERANCE, LAYOUTS, range(4), range(3)
    found = [(*case, flip % 4, flip % 3) for *case, flip in cases()]
    for a, b in combinations(range(5), 2):
        assert {(case[a], case[b]) for case in found} == set(product(kinds[a], kinds[b]))


def test_the_wrong_is_told(monkeypatch):
    monkeypatch.setitem(
        CASES, "wrong", lambda *a: (lambda backend, x: x + (backend == "cpp"), (a[5](1, 1, 2),), ())
    )
    with pytest.raises(SystemExit, match="off by 1"):
        check("wrong", (1, 1, 2, 1, 1), torch.float32, LAYOUTS[0], 0)
