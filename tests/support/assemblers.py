"""The ptxas on this machine beside the one that Triton takes. A user may have set another
(TRITON_PTXAS_PATH), and the next Triton will bring another."""

from __future__ import annotations

import re
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from tab.doctor.doctor import cuda_toolkit
from tab.doctor.kernel_compile import assembler

WHEEL = "nvidia-cuda-nvcc"


def toolkit() -> Path | None:
    home = cuda_toolkit()
    path = home / "bin/ptxas" if home else None
    return path if path and path.is_file() else None


def wheel() -> Path | None:
    try:
        parts = files(WHEEL) or []
    except PackageNotFoundError:
        return None
    return next((Path(part.locate()) for part in parts if part.name == "ptxas"), None)


def newer() -> Path:
    """That of Triton for Blackwell: what the doctor names to users of a Hopper."""
    return Path(assembler(100).path)


# By who brought it; of the wheel pip has the newest.
NEWER = "Triton, for Blackwell"
ASSEMBLERS = {"the CUDA toolkit": toolkit, NEWER: newer, WHEEL: wheel}


def version(ptxas: Path) -> str:
    said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", said)[1]


class TooOld(Exception):
    """An assembler older than the PTX."""


def assemble(ptxas: Path, ptx: str) -> bytes:
    """-> a cubin; an error of ptxas is raised with what it said."""
    target = re.search(r"^\.target (\w+)", ptx, re.M)[1]
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [ptxas, f"-arch={target}", source, "-o", made]
        done = subprocess.run(command, capture_output=True, text=True)
        if said := re.search(r"Unsupported \.version.*", done.stderr):
            raise TooOld(f"ptxas {version(ptxas)}: {said[0]}")
        if done.returncode:
            raise AssertionError(f"{ptxas} on {target}: {done.stderr[:500]}")
        return made.read_bytes()
