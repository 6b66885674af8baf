"""The device code of csrc/cuda, compiled by g++ and run thread by thread (cuda_on_cpu.h)."""

import ctypes
import functools
import hashlib
import shutil
import subprocess

import pytest
import torch
from filelock import FileLock
from paths import ROOT, SUPPORT

KEPT = ROOT / "build" / "cuda_few"
TYPES = (torch.float32, torch.float16, torch.bfloat16)  # the order that cuda_few.cpp knows
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
KINDS = {
    "int": ctypes.c_int,
    "int64": ctypes.c_int64,
    "float": ctypes.c_float,
    "bool": ctypes.c_bool,
    "pointer": ctypes.c_void_p,
}


@functools.cache
def library(mechanism: str) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    flags = [
        f"-D{mechanism.upper()}",
        "-std=c++20",
        "-O1",
        "-fno-strict-aliasing",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",  # calls within the library go straight
        f"-I{SUPPORT}",
    ]
    flags += ["-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    # Of the same sources and flags, for all processes of a test run and for the next one.
    path = KEPT / f"{mechanism}-{_sources(compiler, *flags)}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            made, whole = path.with_suffix(".o"), path.with_suffix(".part")
            # ThreadSanitizer's calls without its runtime: cuda_races.h
            sanitized = ["-c", "-fsanitize=thread", SUPPORT / "cuda_few.cpp", "-o", made]
            cached = ["ccache"] if shutil.which("ccache") else []  # for other clones, too
            subprocess.run([*cached, compiler, *flags, *sanitized], check=True)
            subprocess.run([compiler, *flags, made, "-o", whole], check=True)
            made.unlink()
            whole.replace(path)
    return ctypes.CDLL(str(path))


def _sources(*flags: str) -> str:
    """Another string as soon as a source, the compiler or one of its flags is another."""
    said = subprocess.run([flags[0], "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(said + "\0".join(flags).encode())
    files = [*(ROOT / "csrc" / "cuda").rglob("*"), *SUPPORT.glob("*.h"), SUPPORT / "cuda_few.cpp"]
    for file in sorted(file for file in files if file.is_file()):
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def struct(name: str, members: str) -> type[ctypes.Structure]:
    """struct("Point", "float x y; Color c"), which later ones may have as a member of kind Point"""
    fields = [
        (member, KINDS[kind])
        for line in members.split(";")
        for kind, *names in [line.split()]
        for member in names
    ]
    KINDS[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return KINDS[name]


HEADS = struct("Heads", "pointer data; int64 b h n")
# Which keys a query sees (softmax.cuh)
SEES = struct(
    "Sees",
    "int n; bool causal; int left right rows cols; pointer row_ptr col; int block patterns;"
    "pointer mask",
)


def heads(x: torch.Tensor):
    """x (B, H, N, D), last stride 1"""
    assert x.stride(3) == 1 or x.shape[3] == 1
    return HEADS(x.data_ptr(), *x.stride()[:3])


def run(
    name: str, make, x: torch.Tensor, outputs: list[torch.Tensor], nan: bool = False
) -> list[torch.Tensor]:
    """Runs a kernel: no race and, unless the results hold `nan`, each output written whole and no
    further. make(*outputs) fills the argument structure."""
    fresh = [poison(out) for out in outputs]
    f = getattr(library(name.split("_")[0]), name)
    f.restype, f.argtypes = ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    error = f(ctypes.byref(make(*fresh)), TYPES.index(x.dtype), x.shape[0] * x.shape[1])
    assert not error, f"{name}: {error.decode()}"
    for out in () if nan else fresh:
        assert not out.isnan().any(), f"{name}: an output was not written"
        margin = 0 if out._base is None else out._base.numel() - out.numel()
        assert not margin or out._base.isnan().sum() == margin, f"{name}: wrote too far"
    return fresh


def poison(like: torch.Tensor) -> torch.Tensor:
    """NaN in like's shape; (B, H, N, D) token-major, with a margin after each row."""
    if like.dim() != 4:
        return torch.full(like.shape, torch.nan)
    b, h, n, d = like.shape
    return torch.full((b, n, h, d + 8), torch.nan, dtype=like.dtype)[..., :d].transpose(1, 2)


def unit_last(x: torch.Tensor) -> torch.Tensor:
    """What the launcher does first."""
    return x if x.stride(-1) == 1 else x.contiguous()


def spoilt(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x (B, [H,] N, ·) with NaN and both infinities where a token is masked, mask (B, N)."""
    junk = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=x.dtype)
    real = mask[:, None, :, None] if x.dim() == 4 else mask[..., None]
    return torch.where(real, x, junk[torch.arange(x.shape[-1]) % 3])


def pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def inputs(generator, b, h, n, d, dv, dtype):
    """q, k, v token-major"""
    x = (torch.randn(b, n, h, s, generator=generator).to(dtype) for s in (d, d, dv))
    return [t.transpose(1, 2) for t in x]
