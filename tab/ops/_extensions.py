"""The extensions of this package: which are there, and what an op misses of them."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from pathlib import Path

import torch

DEVICE = {"cpp": "cpu", "triton": "cuda", "cuda": "cuda"}
_missing: dict[str, str] = {}  # extension -> why it is not there


def _load(extension: str) -> None:
    """Loads tab/_C.*. Not built is noted; built and broken raises: silence would hide it."""
    names = (f"{extension}.*so", f"{extension}.*pyd")  # .pyd on Windows
    found = sorted(path for name in names for path in Path(__file__).parents[1].glob(name))
    if not found:
        _missing[extension] = f"the extension tab.{extension} was not built"
        return
    torch.ops.load_library(str(found[0]))


def load_extensions() -> None:
    """Called once, after every op is defined."""
    _load("_C")
    if "_C" in _missing:
        warnings.warn(
            "TAB's C++ kernels were not built; CPU tensors use the slower PyTorch references. "
            "`tab doctor` says more, `pip install .` builds them.",
            stacklevel=3,
        )
    if not torch.cuda.is_available():
        _missing["_C_cuda"] = _missing["triton"] = "no CUDA GPU is visible to torch"
    else:
        _load("_C_cuda")
        if importlib.util.find_spec("triton") is None:
            _missing["triton"] = "triton is not installed"
        else:
            importlib.import_module("tab.kernels._launch").load()


def why_not(op: str, backend: str) -> str | None:
    """Why an op has no kernel of this backend here; None: it has one."""
    if backend in ("auto", "reference"):
        return None
    source = {"cpp": "_C", "triton": "triton", "cuda": "_C_cuda"}[backend]
    name = f"tab_cuda::{op}" if backend == "cuda" else f"tab::{op}"
    if source in _missing:
        return _missing[source]
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, DEVICE[backend].upper()):
        return None
    return f"{op} has no {backend} kernel"
