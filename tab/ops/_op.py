"""What every operator shares: its schema, its reference, the kernels beside it, and who runs when.

A mechanism called `x` declares ops such as `tab::x_fwd` and `tab::x_bwd`. The PyTorch reference is
their CompositeExplicitAutograd kernel: fallback, fake kernel (it runs on meta tensors) and test
oracle in one. Faster kernels register themselves for a device:

    cpp      C++      tab::x_fwd        "CPU"    from tab._C
    triton   Triton   tab::x_fwd        "CUDA"   from tab.kernels.x, by Op.implement
    cuda     CUDA C++ tab_cuda::x_fwd   "CUDA"   from tab._C_cuda (same schema, own namespace)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from ._autograd import below_autograd, function, once_only, plain, register, tracing, transforming
from ._extensions import DEVICE, load_extensions, why_not
from ._shapes import check_of

Backend = Literal["auto", "reference", "cpp", "triton", "cuda"]
BACKENDS: tuple[str, ...] = get_args(Backend)
# Op -> the N up to which "auto" takes CUDA C++ over Triton on a GPU. A measurement decides that
# (bench/gpu.sh); there is none yet, so CUDA C++ is not taken unasked.
CUDA_TOKENS: dict[str, int] = {}
OPS: dict[str, Op] = {}


def _without_autocast(reference: Callable, check: Callable | None = None) -> Callable:
    """The operands of an op are cast already; autocast inside would undo the float32 sums."""

    def run(*args):
        if check is not None:
            check(*args)
        with torch._C._DisableAutocast():
            return reference(*args)

    return run


def no_flops(*_, **__) -> int:
    """Of an op whose work is not counted: it sorts, gathers, or has no matrix product.

    >>> tab.ops.no_flops((2, 4, 16, 8))
    0
    """
    return 0


class Op:
    """One operator under every backend. In its schema the tensors come first, then the options.

    flops: FLOPs of one call, from the shapes of its arguments, as torch.utils.flop_counter calls a
        formula: matrix products by what the formula needs, two a multiply-add, whatever a kernel
        does beside it. What a backward op is not given, such as the scores, it has to form again.
    shapes: what its tensors look like (_shapes.py), which is checked before a kernel runs, whoever
        calls it. Without it kernels are given what comes.

    >>> op = tab.ops.OPS["linear_fwd"]
    >>> op.name, op.tensors > 2  # of its arguments
    ('linear_fwd', True)
    """

    def __init__(
        self, name: str, schema: str, reference: Callable, *, flops: Callable[..., int],
        shapes: str | None = None,
    ):  # fmt: skip
        self.name, self.reference, self.flops = name, reference, flops
        self.own = True  # whether its kernels are its own, and not those of another op
        self.reasons: dict[str, str | None] = {}  # backend -> why not; find_kernels fills it
        # backend -> why its kernel does not take these tensors, or None; a backend that is not here
        # takes all. `implement` fills it.
        self.takes: dict[str, Callable[..., str | None]] = {}
        self.kernels: dict[str, Callable] = {}  # backend -> what `implement` registered
        self.run: Callable = self  # (backend, *args) -> the outputs, in eager use
        self.sunk: Op  # the same with sinks, where with_sinks made it
        for namespace in ("tab", "tab_cuda"):
            torch.library.define(f"{namespace}::{name}", schema)
        self.overload = getattr(torch.ops.tab, name).default
        self.shapes = shapes
        self.check = None if shapes is None else check_of(name, self.overload._schema, shapes)
        for namespace in ("tab", "tab_cuda"):
            torch.library.impl(
                f"{namespace}::{name}", "CompositeExplicitAutograd",
                _without_autocast(reference, self.check),
            )  # fmt: skip
        self.cuda_overload = getattr(torch.ops.tab_cuda, name).default
        # What an OpOverload calls: its own __call__ is one more frame of Python in every call.
        self.call, self.cuda_call = self.overload._op, self.cuda_overload._op
        kinds = [
            str(x.type) in ("Tensor", "Optional[Tensor]") for x in self.overload._schema.arguments
        ]
        self.tensors = sum(kinds)
        if not all(kinds[: self.tensors]):
            raise ValueError(f"{name}: tensors come first in the schema, got {schema}")
        OPS[name] = self
        if _loaded:  # an op from outside, which may have kernels registered later
            self.find_kernels()

    def __call__(self, backend: str, *args):
        """One kernel. torch.jit.trace looks whether it writes the same graph without gradients."""
        if torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled() or tracing():
            if backend == "reference":
                return plain(self.reference, args)
            return (self.cuda_overload if backend == "cuda" else self.overload)(*args)
        return self.below(backend, *args)

    def below(self, backend: str, *args):
        """One kernel, gradients off: past the Autograd key, whose kernel is Python. Dynamo cannot
        trace the guard, and needs none."""
        if backend == "reference":
            return plain(self.reference, args)
        with below_autograd():
            return (self.cuda_call if backend == "cuda" else self.call)(*args)

    def implement(
        self, backend: str, kernel: Callable, takes: Callable[..., str | None] | None = None
    ) -> None:
        """Registers a kernel that is launched from Python, for the device of this backend.

        takes: (*tensors, …) -> why the kernel does not take them, or None. It gets the op's
            arguments, or of those only the leading tensors, which `choose` is given. What the
            kernel does not take, the reference computes where nobody asked for the backend by name;
            `choose` refuses who does.
        """
        reference, check = _without_autocast(self.reference), self.check

        def run(*args):
            if check is not None:
                check(*args)
            return kernel(*args) if takes is None or takes(*args) is None else reference(*args)

        self.kernels[backend] = run
        if takes is not None:
            self.takes[backend] = takes
        namespace = "tab_cuda" if backend == "cuda" else "tab"
        torch.library.impl(f"{namespace}::{self.name}", DEVICE[backend].upper(), run)
        if _loaded:
            self.find_kernels()

    def differentiable(self, gradients: Callable, by: Op | None = None, constant: int = 0) -> None:
        """Gives the op its gradients, on its Autograd key and in `apply`.

        gradients: (backend, gradients of the outputs, *tensors, *outputs, *options) -> those of the
            tensors, in the schema's order; None where there is none, the last Nones left out. It
            runs the op `by`, which is thereby closed to second derivatives. The gradient of an
            output that nothing depends on is None.
        constant: how many outputs, the last ones, carry no gradient, and come with none; the
            reference detaches them.
        """
        self.gradients, self.constant = gradients, constant
        self.run = function(self, gradients, constant)
        register(self, self.run)
        if by is not None:
            register(by, once_only(by, self.name).apply)

    def apply(self, backend: str, *args):
        """What a public function calls: the op with its gradients. Nothing to compute (B or N is 0)
        and torch.func transforms are the reference's, so that no kernel meets them (`choose` has
        refused a named one). Dynamo and torch.jit.trace write the op into their graphs; its
        Autograd key gives the gradients."""
        if transforming() or args[0].numel() == 0:
            return plain(self.reference, args)
        if torch.compiler.is_dynamo_compiling() or tracing():
            return self(backend, *args)
        if torch.is_grad_enabled():
            for x in args[: self.tensors]:
                if x is not None and x.requires_grad:
                    return self.run(backend, *args)
        return self.below(backend, *args)

    def find_kernels(self) -> None:
        """Notes which backends have a kernel: once, for torch.compile cannot trace what the
        dispatcher answers. An op from outside that loads its own library of C++ kernels calls it
        again."""
        self.reasons = {backend: why_not(self.name, backend) for backend in BACKENDS}

    def why_not(self, backend: str) -> str | None:
        """None when this backend can run here, else the reason why it cannot."""
        return self.reasons[backend]


# --- which backend --------------------------------------------------------------------------------

_default = cast(Backend, os.environ.get("TAB_BACKEND", "auto"))
if _default not in BACKENDS:
    raise ValueError(f"TAB_BACKEND={_default!r} is none of {', '.join(BACKENDS)}")


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Within the block, operators called with backend="auto" use `name`; process-wide. So does the
    environment variable TAB_BACKEND.

    "auto" takes the fastest kernel that is there for the device: Triton on a GPU, C++ on a CPU,
    else "reference", the formula in PyTorch operators. "cpp", "triton" and "cuda" (CUDA C++) run
    that kernel or raise a RuntimeError that says why not; they never fall back. Two things are the
    reference's on every backend: derivatives of second and higher order, and empty tensors, where
    there is nothing to compute. torch.func transforms and forward-mode derivatives go by the
    reference too, and so refuse a named kernel.

    Example:
        >>> with tab.use_backend("reference"):
        ...     o = tab.linear_attention(*torch.randn(3, 1, 4, 16, 8))
        >>> o.shape
        torch.Size([1, 4, 16, 8])

    Raises:
        ValueError: there is no such backend.
    """
    global _default
    if name not in BACKENDS:
        raise ValueError(f"use_backend({name!r}): choose one of {', '.join(BACKENDS)}")
    before, _default = _default, name
    try:
        yield
    finally:
        _default = before


class Unavailable(RuntimeError):
    """An explicit backend does not run this; `reason` alone is for tables."""

    def __init__(self, backend: str, op: str, reason: str):
        super().__init__(f"backend={backend!r} of {op} is not available: {reason}; {_way_out()}")
        self.reason = reason


def _way_out() -> str:
    """Where a default is set, "auto" is that default."""
    return f'use backend="{"auto" if _default == "auto" else "reference"}"'


def choose(backend: Backend, op: Op, x: Tensor, *others: object, cuda: bool = True) -> Backend:
    """The backend that will run `op` on `x` (…, N, D) and the `others` of its arguments: the
    caller's, else the default, else what CUDA_TOKENS says, else "auto", which is the dispatcher.

    `cuda` says whether the CUDA C++ kernel, where there is one, takes this problem. An explicit
    backend that cannot run raises a RuntimeError that says why; it never falls back.

    >>> op, x = tab.ops.OPS["linear_fwd"], torch.zeros(1, 4, 16, 8)
    >>> tab.ops.choose("reference", op, x)
    'reference'
    >>> tab.ops.choose("triton", op, x)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    RuntimeError: backend='triton' of linear_fwd runs on cuda tensors, these are on cpu; ...
    """
    if backend == "auto":
        backend = _default
    if backend == "auto":
        few = x.is_cuda and x.dtype != torch.float64 and x.shape[-2] <= CUDA_TOKENS.get(op.name, 0)
        return "cuda" if few and cuda and op.why_not("cuda") is None else "auto"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    device = x.device.type
    if device == "meta" or backend == "reference":
        return backend
    if DEVICE[backend] != device:
        raise RuntimeError(
            f"backend={backend!r} of {op.name} runs on {DEVICE[backend]} tensors, these are on "
            f"{device}; move them, or {_way_out()}"
        )
    reason = op.why_not(backend)
    if transforming():
        reason = "torch.func transforms and forward-mode derivatives are of the PyTorch reference"
    if reason is None and backend in op.takes:
        reason = op.takes[backend](x, *others)
    if reason:
        raise Unavailable(backend, op.name, reason)
    return backend


# --- loading --------------------------------------------------------------------------------------

_loaded = False  # whether the kernels of this package are there


def load_kernels() -> None:
    """Called once by tab.ops, after every op is defined."""
    global _loaded
    load_extensions()
    for op in OPS.values():
        op.find_kernels()
    _loaded = True
