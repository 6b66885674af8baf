"""Steps of training as a CUDA graph, with what a CPU can do in the graph's place."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tab.train.steps import Steps


class Rehearsal:
    """A Recorder without a GPU. Its replay is that of a graph: the operators of the capture, with
    the numbers that they were given there, on the memory that they had there."""

    def __init__(self):
        self.captures = 0

    def run(self, body):
        body()

    def capture(self, body):
        self.captures += 1
        with Written() as written:
            body()
        return written.again


class Written(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.namespace != "profiler":
            self.lines.append((func, args, kwargs or {}, found))
        return found

    @torch.no_grad()
    def again(self):
        for func, args, kwargs, found in self.lines:
            for old, new in zip(_tensors(found), _tensors(func(*args, **kwargs)), strict=True):
                if _place(old) != _place(new):  # else a view, or what was changed in place
                    old.copy_(new)


def _tensors(found) -> list[torch.Tensor]:
    return [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]


def _place(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def rehearsed(steps: Steps) -> tuple[Steps, Rehearsal]:
    recorder = Rehearsal()
    steps.record(recorder, recorder)
    return steps, recorder


def repeatable(steps: Steps) -> Steps:
    """What such a graph repeats, as plain steps without a capture."""
    steps.record(Rehearsal(), Rehearsal())
    steps._run_descent, steps._run_sums = steps._descend, steps._sums
    return steps
