"""What the benchmark has to know of an op. Each file of tab/bench/ops/ says it of one.

The work of an op is the least that any implementation must do: each input is read once and each
output written once, and `flops` are the multiply-adds of the formula, nothing recomputed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..ops import BACKENDS, Op
from .cases import Case

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """The tensors of a case. `inputs` carry gradients, `fixed` are what the op needs besides."""

    case: Case
    benchmark: Benchmark
    inputs: tuple[Tensor, ...]
    fixed: dict[str, object] = field(default_factory=dict)
    weights: int = 0  # how many of the last inputs have no batch dimension

    def sliced(self, dtype: torch.dtype) -> Problem:
        """One batch entry and all heads, in another type: for the check against float64."""
        batched = len(self.inputs) - self.weights
        cut = tuple(
            _at_least(x[:1] if i < batched else x, dtype) for i, x in enumerate(self.inputs)
        )
        fixed = {
            name: _at_least(x, dtype) if isinstance(x, Tensor) else x
            for name, x in self.fixed.items()
        }
        return Problem(self.case.with_dtype(dtype), self.benchmark, cut, fixed, self.weights)


def _at_least(x: Tensor, dtype: torch.dtype) -> Tensor:
    """States and projections stay in float32 beside half types."""
    return x.detach().to(torch.promote_types(x.dtype, dtype))


class Draw:
    """Random tensors for a case, of unit variance times `scale`: the same for the same seed."""

    def __init__(self, case: Case, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype = case.device, case.dtype
        self.accumulate = torch.promote_types(case.dtype, torch.float32)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=self.generator) * scale
        return x.to(self.device, self.dtype)


@dataclass
class Contestant:
    """Who takes part in a race: a function of the problem's inputs, or why there is none here."""

    name: str
    build: Callable[[Problem], Function]
    why_not: str | None = None
    differentiable: bool = True


class Benchmark:
    """One op, as the benchmark sees it. A subclass sets what differs and writes the methods.

    op: whose backends are raced; None for a composition of PyTorch operators, which has none.
    causal: the forms that it has, of False and True.
    differentiable: False where only the forward pass is measured.
    exact: False where a rival may rightly compute another approximation. Its error is then shown
        and not judged.
    decode: the benchmark of one query after N tokens, for the size of that name; None without one.
    """

    op: Op | None = None
    causal: tuple[bool, ...] = (False, True)
    differentiable = True
    exact = True
    decode: Benchmark | None = None

    def runs_here(self) -> list[str]:
        """The backends of the op that can run here."""
        real = [backend for backend in BACKENDS if backend != "auto"]
        return [b for b in real if self.op and self.op.why_not(b) is None]

    # --- the problem ------------------------------------------------------------------------------

    def problem(self, case: Case, draw: Draw) -> Problem:
        """The tensors of this case: by default q, k, v, each (B, H, N, D)."""
        return Problem(case, self, tuple(draw(*case.shape) for _ in "qkv"))

    def ours(self, p: Problem, backend: str) -> Function:
        """TAB's own op as a function of the inputs of `p`."""
        raise NotImplementedError

    def flops(self, p: Problem) -> tuple[int, ...]:
        """FLOPs of the forward pass, and of the backward pass where there is one."""
        raise NotImplementedError

    def exponentials(self, p: Problem) -> int:
        """How many the forward pass needs; by default none is counted. They are part of the floor
        on a CPU, and of no rate in FLOP/s."""
        return 0

    def written(self, p: Problem) -> int:
        """Bytes of the outputs: by default of one, (B, H, N, D)."""
        b, h, n, d = p.case.shape
        return b * h * n * d * p.inputs[0].element_size()

    def work(self, p: Problem) -> dict[str, tuple[int, int]]:
        """{"forward": (FLOPs, bytes), "backward": …, "both": …}"""
        read, written = sum(x.nbytes for x in p.inputs), self.written(p)
        forward, *backward = self.flops(p)
        found = {"forward": (forward, read + written)}
        if backward:  # inputs, output and its gradient are read, input gradients written
            found["backward"] = backward[0], 2 * read + 2 * written
            found["both"] = forward + backward[0], 3 * read + 3 * written
        return found

    # --- the rivals -------------------------------------------------------------------------------

    def pytorch(self, p: Problem) -> Iterator[Contestant]:
        """What a user would write by hand in a few operators of PyTorch, or find in PyTorch."""
        raise NotImplementedError

    def peers(self, p: Problem) -> Iterator[Contestant]:
        """Other packages: never a dependency, and raced where they are installed. Default: none."""
        yield from ()

    def contestants(self, p: Problem) -> Iterator[Contestant]:
        """TAB first, then PyTorch, then peers; those that cannot run here carry the reason."""
        cpu = p.case.device.split(":")[0] == "cpu"
        yield Contestant("tab", lambda p: self.ours(p, "auto"), None, self.differentiable)
        backends = ("reference", "cpp") if cpu else ("reference", "triton", "cuda")
        for backend in backends if self.op else ():
            yield Contestant(
                f"tab {backend}",
                lambda p, b=backend: self.ours(p, b),
                self.op.why_not(backend),
                self.differentiable,
            )
        yield from self.pytorch(p)
        yield from self.peers(p)

    # --- the twin in whole models (steps.py) ------------------------------------------------------

    def part(self, layer: nn.Module) -> nn.Module | None:
        """What in this layer attends by the op: the layer itself, a module of it, or None."""
        return None

    def use_pytorch(self, part: nn.Module) -> None:
        """Makes the `part` of a layer attend in plain PyTorch; all around it stays as it is."""
        raise NotImplementedError

    def use_nothing(self, part: nn.Module) -> None:
        """Makes the `part` attend at no cost, and say nothing: what stands around it remains."""
        part.attend = lambda q, k, v, key_mask: nothing(v.shape, q, k, v)


class _Nothing(torch.autograd.Function):
    """A backward pass of zeros, so that what made the inputs has all of its own to do."""

    @staticmethod
    def forward(ctx, shape, *inputs):
        ctx.shapes = [x.shape for x in inputs]
        b, h, n, d = shape
        return inputs[0].new_zeros(b, n, h, d).transpose(1, 2)  # the heads side by side, as ops do

    @staticmethod
    def backward(ctx, gradient):
        return None, *(gradient.new_zeros(shape) for shape in ctx.shapes)


def nothing(shape: torch.Size, *inputs: Tensor) -> Tensor:
    """Zeros (B, H, N, D), laid out as the ops lay out theirs; the gradients of all inputs are 0."""
    return _Nothing.apply(shape, *inputs)


SHAPES = 64  # of a function that may be compiled in one process; PyTorch's own limit is 8


def compiled(f: Function, **options) -> Function:
    """torch.compile of f, for the shapes of each call; an error where PyTorch would run it as it
    stands instead, in silence, as it does from the ninth shape on."""
    from torch._dynamo import config

    config.recompile_limit = SHAPES
    return torch.compile(f, dynamic=False, fullgraph=True, **options)


def eager_and_compiled(
    f: Function, name: str = "eager", differentiable: bool = True
) -> Iterator[Contestant]:
    """A function in plain PyTorch, and torch.compile of it."""
    yield Contestant(name, lambda _: f, None, differentiable)
    label = "compile" if name == "eager" else f"{name} compile"
    yield Contestant(label, lambda _: compiled(f), None, differentiable)


def peer(
    name: str,
    module: str,
    build: Callable[[Problem], Function],
    p: Problem,
    *,
    gpu_only: bool = False,
    other: str | None = None,
) -> Contestant:
    """A package that is raced if it is installed. other: why it computes another function."""
    reason = other
    if gpu_only and not p.case.device.startswith("cuda"):
        reason = "runs on CUDA GPUs only"
    elif importlib.util.find_spec(module) is None:
        reason = f"{module} is not installed (pip install transformer-attention-bench[peers])"
    return Contestant(name, build, reason)
