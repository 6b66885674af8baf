"""Triton's interpreter: launchers that run on CPU tensors, in a process with TRITON_INTERPRET=1."""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tab.kernels import _launch
from tab.ops import OPS

assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton loads"

_launch.load()

exact = InterpreterBuilder.create_dot


def create_dot(builder, a, b, d, input_precision, most):
    """As tensor cores do it: of a float32 operand of a tf32 product the last 13 bits are dropped,
    not rounded. (The interpreter multiplies exactly.)"""
    if input_precision == ir.INPUT_PRECISION.TF32:
        a, b = truncated(a), truncated(b)
    return exact(builder, a, b, d, input_precision, most)


def truncated(x: TensorHandle) -> TensorHandle:
    if x.data.dtype != np.float32:
        return x
    return TensorHandle((x.data.view(np.uint32) & 0xFFFFE000).view(np.float32), x.dtype)


InterpreterBuilder.create_dot = create_dot

# --- the same, in a third of the time ------------------------------------------------------------
# The interpreter patches all of triton.language for a launch, and again for each call of a function
# in it, which here it may stay; it makes a table of all types to look up one; it scans number by
# number; it describes the shape of each result anew, down to one object a dimension; it asks of
# each pair of operands what type they have in common; and of each sum of integers it finds out, in
# seven operators, whether it overflows, and tells those alone who debug.

np_dtype, tables = interpreter._get_np_dtype, {}


def looked_up(dtype) -> np.dtype:
    dtype = dtype.scalar
    if isinstance(dtype, tl.pointer_type):
        return np_dtype(dtype)
    if dtype.name not in tables:
        tables[dtype.name] = np_dtype(dtype)
    return tables[dtype.name]


def scanned(scan, inputs):
    """By whole slices across the axis; what combines two numbers does so element by element."""
    before = [np.moveaxis(x.handle.data, scan.axis, 0) for x in inputs]
    after = [x.copy() for x in before]
    for i in range(1, len(before[0])):
        parts = [x[i - 1] for x in after] + [x[i] for x in before]
        types = [x.dtype for x in inputs] * 2
        found = scan.combine_fn.fn(*map(scan.to_tensor, parts, types))
        found = found if isinstance(found, tuple) else (found,)
        for x, new in zip(after, found, strict=True):
            x[i] = new.handle.data
    moved = (np.moveaxis(x, 0, scan.axis) for x in after)
    return [scan.to_tensor(x, y.dtype) for x, y in zip(moved, inputs, strict=True)]


made, block, tensor = {}, tl.block_type.__init__, tl.tensor.__init__


def described(self, element, shape):
    """A type of blocks, from the first one that was made of the same; nobody changes one."""
    key = id(element), *(x.value if isinstance(x, tl.constexpr) else x for x in shape)
    if key not in made:
        block(self, element, shape)
        whole = tl.tensor.__new__(tl.tensor)
        tensor(whole, None, self)
        self.of_tensors = whole.numel, whole.shape
        made[key] = self.__dict__  # holds the element, whose id is taken as long as it lives
    self.__dict__ = made[key]


number = tl.tensor(None, tl.int1)


def wrapped(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = type.of_tensors if type.is_block() else (number.numel, number.shape)


pairs, common = {}, TritonSemantic.binary_op_type_checking_impl
broadcast = TritonSemantic.broadcast_impl_value


def paired(semantic, left, right, *how, **more):
    """Two operands as Triton would make them, as it did before with others of these types: a number
    is the same constant again; a tensor is cast, and has its new shape by name: NumPy spreads it
    when it meets the other."""
    key = *map(kind, (left, right)), *how, *more.items()
    if key not in pairs:
        types = getattr(left, "type", None), getattr(right, "type", None)  # whose ids are taken
        pairs[key] = common(semantic, left, right, *how, **more), types
        return pairs[key][0]
    x, y = pairs[key][0]
    return turned(semantic, left, x), turned(semantic, right, y)


def turned(semantic, given, like):
    if given.__class__ is not tl.tensor:
        return like
    if given.type.scalar is not like.type.scalar:
        given = semantic.cast(given, like.type.scalar)
    return tl.tensor(given.handle, like.type)


def spread(semantic, left, right):
    return (left, right) if kind(left) == kind(right) else broadcast(semantic, left, right)


def kind(x):
    return id(x.type.__dict__) if x.__class__ is tl.tensor else (x.__class__, x)


def reached(obj, name, member, builder, scope):
    """A function of Triton's language, without two frames around each call of it."""
    inner, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

    def new(*args, **options):
        options["_semantic"] = semantic
        return inner(*args, **options)

    scope.set_attr(obj, name, new)


EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def held(semantic, left, right, operator):
    """An integer of up to 32 bits is what it would be in 64."""
    if left.dtype.int_bitwidth < 64:
        x, y = left.handle.data, right.handle.data
        exact, name = EXACT[operator.__name__](x, y, dtype=np.int64), operator.__name__
        assert (exact == exact.astype(x.dtype)).all(), f"{left.dtype} overflows: {name}"


interpreter._get_np_dtype = looked_up
tl.str_to_ty = cache(tl.str_to_ty)  # else each launch has types of its own
interpreter.ScanOps.generic_scan = scanned
tl.block_type.__init__ = described
tl.tensor.__init__ = wrapped
TritonSemantic.binary_op_type_checking_impl = paired
TritonSemantic.broadcast_impl_value = spread
interpreter._patch_attr = reached
TritonSemantic.binary_op_sanitize_overflow_impl = held
interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))  # for good
interpreter._patch_lang = lambda function: interpreter._LangPatchScope()


def interpreted(*ops: str, instead_of: str = "tab_cuda") -> list[Callable]:
    """What these ops run for backend="triton", the reference where the kernel takes them not; in
    this process it takes the place of the CUDA C++ ops for CPU tensors, or of `instead_of`."""
    for op in ops:
        torch.library.impl(f"{instead_of}::{op}", "CPU", OPS[op].kernels["triton"])
    return [OPS[op].kernels["triton"] for op in ops]
