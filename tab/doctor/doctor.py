"""What is installed, what was built, and which backend of which operator can run here."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import __version__
from ..ops import BACKENDS, OPS

EXTENSIONS = {
    "_C": "CPU kernels (C++)",
    "_C_cuda": "GPU kernels (CUDA C++)",
    "_host": "batch assembly (C++)",
}


def backends() -> dict[str, dict[str, str | None]]:
    """Operator -> backend -> None if it can run here, else why not."""
    real = [backend for backend in BACKENDS if backend != "auto"]
    return {name: {b: op.why_not(b) for b in real} for name, op in OPS.items() if op.own}


def available() -> dict[str, list[str]]:
    """Operator -> the backends that can run here."""
    return {
        name: [backend for backend, why in row.items() if why is None]
        for name, row in backends().items()
    }


def versions() -> list[tuple[str, str]]:
    """(what, which), for a table."""
    cuda = torch.cuda.is_available()
    gpu = torch.cuda.get_device_name() if cuda else "none visible to torch"
    return [
        ("tab", f"{__version__}, in {Path(__file__).parents[1]}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, built for CUDA {torch.version.cuda or '–'}"),
        ("triton", _version("triton")),
        ("CUDA toolkit", str(cuda_toolkit() or "not found")),
        ("CPU", f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"),
        ("torch threads", str(torch.get_num_threads())),
        ("GPU", gpu),
        *((f"tab.{name}", f"{what}: {built(name)}") for name, what in EXTENSIONS.items()),
    ]


def built(extension: str) -> str:
    """'built', or 'not built' and why, where the build left a note (setup.py); one that is there
    and broken raises, here or at `import tab.ops`."""
    folder = Path(__file__).parents[1]
    if not any(path for end in ("so", "pyd") for path in folder.glob(f"{extension}.*{end}")):
        notes = folder / "left_out.json"
        said = json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {}
        why = said.get(f"tab.{extension}")
        return f"not built: {why}" if why else "not built"
    if extension == "_host":
        importlib.import_module("tab._host")
    return "built"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """'Intel(R) Xeon(R) …', or what the platform calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def cuda_toolkit() -> Path | None:
    """The folder that holds include/cuda_runtime.h; an nvcc on the PATH may be a mere wrapper."""
    nvcc = shutil.which("nvcc")
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    guesses += [Path(nvcc).resolve().parents[1]] if nvcc else []
    homes = (Path(guess) for guess in guesses if guess)
    return next((home for home in homes if (home / "include/cuda_runtime.h").is_file()), None)
