"""Launches that are known go past Triton's own search for the compiled kernel; nothing runs."""

import itertools

import pytest
import torch

pytest.importorskip("triton")
from tab.kernels import _launch


class Kernel:
    """Stands for a Triton kernel f(x, n, y, A, B): notes what is compiled, and what launched."""

    arg_names = ("x", "n", "y", "A", "B")

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.compiled.append((grid, args, options))
            return Compiled(self.launched)

        return run


class Compiled:
    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *args: self.launched.append((grid, args))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(_launch, "_compiled", {})
    return Kernel()


def test_a_known_launch_gets_all_arguments(kernel):
    x, y = torch.empty(4), torch.empty(8)
    for tensor in (x, y):
        _launch.dispatch(kernel, (7,), 0, (tensor, 3, None), {"B": 2, "A": 5, "num_warps": 4})
    assert len(kernel.compiled) == 1
    (grid, args), *rest = kernel.launched
    assert not rest and grid == (7, 1, 1)
    assert args[0] is y and args[1:] == (3, None, 5, 2)  # in the order of the signature


CHANGES = {
    "type": lambda x, n, y: (x.half(), n, y),
    "alignment": lambda x, n, y: (x[1:], n, y),
    "one": lambda x, n, y: (x, 1, y),
    "multiple of 16": lambda x, n, y: (x, 32, y),
    "64 bits": lambda x, n, y: (x, 3 + 2**40, y),
    "number's type": lambda x, n, y: (x, 3.0, y),
    "nothing": lambda x, n, y: (x, n, None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_triton_tells_apart_is_told_apart(kernel, change):
    args = torch.empty(64), 3, torch.empty(64)
    options = {"A": 1, "B": 1}
    _launch.dispatch(kernel, (1,), 0, args, options)
    _launch.dispatch(kernel, (1,), 0, CHANGES[change](*args), options)
    assert len(kernel.compiled) == 2 and not kernel.launched


def test_device_options_and_kernels_are_told_apart(kernel):
    args, other = (torch.empty(64), 3, None), Kernel()
    for device, b, warps in itertools.product((0, 1), (1, 2), (4, 8)):
        for each in (kernel, other):
            _launch.dispatch(each, (1,), device, args, {"A": 1, "B": b, "num_warps": warps})
    assert len(kernel.compiled) == len(other.compiled) == 8


def test_lengths_that_never_come_again_are_forgotten(kernel, monkeypatch):
    monkeypatch.setattr(_launch, "MOST_COMPILED", 3)
    for n in range(10):
        _launch.dispatch(kernel, (1,), 0, (torch.empty(4), n, None), {"A": 1, "B": 1})
        assert len(_launch._compiled) <= 3
