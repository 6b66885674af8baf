"""What all launchers share: registering, launching, the operands as kernels take them."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tab.ops import OPS

# How tl.dot multiplies, by input type. float32: three tf32 products of split factors. float16 goes
# through tf32: as many mantissa bits, and sums over many tokens do not overflow.
PRECISION = {torch.float32: "tf32x3", torch.float16: "tf32", torch.bfloat16: "bf16"}
SHORT = 16  # tokens up to which bfloat16 takes tf32 too: rounding errors do not average out yet

# --- registering ----------------------------------------------------------------------------------


class Launcher(NamedTuple):
    run: Callable
    cases: Callable[[], Iterable[tuple]]  # -> arguments of `run`, on meta tensors


LAUNCHERS: dict[str, Launcher] = {}  # by the name of the op; each file of this folder adds its own
FOLDER = Path(__file__).parent


def load() -> None:
    """Imports every file of this folder; each registers its launchers with the ops."""
    for path in sorted(FOLDER.glob("[!_]*.py")):
        importlib.import_module(f"{__package__}.{path.stem}")


def register(
    op: str,
    run: Callable,
    *,
    takes: Callable[..., str | None] | None = None,
    cases: Callable[[], Iterable[tuple]],
) -> None:
    """Makes `run` the Triton kernel of tab::op, for what it takes (see `Op.implement`).

    cases: the problems for which `tab doctor --kernels` compiles ahead what `run` would launch:
        each way that it goes, with each kind of kernel that it chooses there.
    """
    OPS[op].implement("triton", run, takes)
    LAUNCHERS[op] = Launcher(run, cases)


def register_packed(op: str, run: Callable, *, cases: Callable[[], Iterable[tuple]]) -> None:
    """Makes `run` what tab::op, a packed one, asks before it takes one length after the other:
    run(ends, *arguments), with the ends as numbers -> the results, or None. `cases` as above."""
    OPS[op].together = run  # type: ignore[attr-defined]

    def alike(*args):  # sequences of one length, where the ends have no memory
        count, tokens = len(args[-2]) - 1, args[0].shape[2]
        return run([i * tokens // count for i in range(count + 1)], *args)

    alike.__module__ = run.__module__
    LAUNCHERS[op] = Launcher(alike, cases)


def outside(x: Tensor, most: int | None = None, **sizes: int) -> str | None:
    """Why a kernel that takes sizes up to `most` does not take x's dtype or `sizes`, or None."""
    if x.dtype not in PRECISION:
        return f"it takes float32, bfloat16 and float16, got {str(x.dtype).removeprefix('torch.')}"
    wide = {name: size for name, size in sizes.items() if size > most}
    return next((f"it takes {name} up to {most}, got {wide[name]}" for name in wide), None)


def meta_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """For `cases`: a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_heads(b: int, h: int, n: int, size: int, dtype: torch.dtype) -> Tensor:
    """The same, (B, H, N, size), laid out as (B, N, H, size)."""
    return meta_tensor(b, n, h, size, dtype=dtype).transpose(1, 2)


# --- launching ------------------------------------------------------------------------------------

HOPPER = 90
MOST_BLOCKS = 65535  # of a grid, in its second and third dimension

_recorder, _arch = None, HOPPER


@contextlib.contextmanager
def recording(recorder, arch: int = HOPPER):
    """Within the block, launches call recorder(kernel, grid, *args, **options) and run nothing;
    launchers choose as for this architecture, 10 · major + minor of its capability."""
    global _recorder, _arch
    before, (_recorder, _arch) = (_recorder, _arch), (recorder, arch)
    try:
        yield
    finally:
        _recorder, _arch = before


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """kernel[grid](*args) on the device of the first tensor. One place, so that
    tab.doctor.kernel_launches can write down what would run."""
    if _recorder is not None:
        return _recorder(kernel, grid, *args, **options)
    if max(grid[1:], default=1) > MOST_BLOCKS:
        raise ValueError(
            f"{kernel.__name__}: a grid of {' × '.join(map(str, grid))} programs, and CUDA takes "
            f"{MOST_BLOCKS} at most beyond the first dimension: give fewer tokens at once"
        )
    device = args[0].device
    if device.type != "cuda":
        return kernel[grid](*args, **options)
    same = device.index == torch.cuda.current_device()
    with contextlib.nullcontext() if same else torch.cuda.device(device):
        dispatch(kernel, grid, device.index, args, options)


# What a launch is known by -> the compiled kernel, the values of the options that are arguments.
_compiled: dict[tuple, tuple] = {}
MOST_COMPILED = 4096  # of them: lengths that never come again


def dispatch(kernel, grid: tuple[int, ...], device: int, args: tuple, options: dict) -> None:
    """kernel[grid](*args, **options) on the current device, whose index is given. Triton asks each
    time what it compiled for arguments of such types and values; here a dictionary knows, which
    tells more of them apart (docs/gpu.md has the times)."""
    values = [(x.dtype, x.data_ptr() & 15) if isinstance(x, Tensor) else x for x in args]
    key = kernel, device, (*map(type, args),), (*values,), (*options.items(),)
    known = _compiled.get(key)
    if known is not None:
        return known[0][*grid, 1, 1](*args, *known[1])
    if len(_compiled) >= MOST_COMPILED:
        _compiled.clear()
    constants = [options[name] for name in kernel.arg_names[len(args) :]]
    _compiled[key] = kernel[grid](*args, **options), constants


def block(size: int, most: int = 64) -> int:
    """The tile length for a dimension: a power of two from 16, the least that tl.dot takes."""
    return min(most, max(16, triton.next_power_of_2(size)))


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; without a GPU (interpreter, compiling ahead) a Hopper's 132."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def capability(device: torch.device) -> int:
    """10 · major + minor; without a GPU that of a Hopper, or of what is compiled for."""
    if device.type != "cuda":
        return _arch
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def precision(x: Tensor) -> str:
    """How products with x (B, H, N, D) are computed."""
    short = x.dtype == torch.bfloat16 and x.shape[2] <= SHORT
    return "tf32" if short else PRECISION[x.dtype]


# --- operands -------------------------------------------------------------------------------------


def mask_bytes(key_mask: Tensor | None) -> Tensor | None:
    """(B, N) bool as kernels take it: bytes, whole rows."""
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def rules_of(key_mask: Tensor | None, slopes: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both as kernels of scores take them: the slopes (H,) lie one behind the other."""
    return mask_bytes(key_mask), None if slopes is None else slopes.contiguous()


def rows(x: Tensor) -> Tensor:
    """x with unit stride in its last dimension: itself, else one copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def whole(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each contiguous, or None as it is."""
    return [None if x is None else x.contiguous() for x in tensors]


def strided(*tensors: Tensor) -> list:
    """Tensors with unit stride in the last dimension as kernels take them: each its first element,
    then its strides but the last."""
    return [y for x in tensors for y in (x, *x.stride()[:-1])]


def token_major_empty(like: Tensor, size: int | None = None) -> Tensor:
    """Uninitialised (B, H, N, D) as `like`, D or `size` wide, laid out as (B, N, H, ·)."""
    b, h, n, d = like.shape
    return like.new_empty(b, n, h, d if size is None else size).transpose(1, 2)
