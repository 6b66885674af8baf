"""Rows of the kernel report that were found before: compiling all kernels takes minutes."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from ..files import digest, write_text
from .kernel_compile import assembler
from .kernel_launches import Launch, identity

HERE = Path(__file__).parent


class Kept:
    """The rows of one state of the sources and of Triton, on disk beside what Triton compiled."""

    def __init__(self) -> None:
        import triton

        folder = Path(triton.knobs.cache.dir)
        self.path = folder / f"tab-kernel-report-{_state()}.json"
        try:
            self.rows = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.rows = {}
        self.new = False

    def get(self, op: str, launch: Launch, arch: int) -> dict | None:
        return self.rows.get(_name(op, launch, arch))

    def add(self, op: str, launch: Launch, arch: int, row: dict) -> None:
        self.rows[_name(op, launch, arch)] = row
        self.new = True

    def save(self) -> None:
        """A folder that cannot be written costs the next report its minutes, and nothing else."""
        if not self.new:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(self.rows))
        except OSError:
            return
        self.new = False


def _name(op: str, launch: Launch, arch: int) -> str:
    return f"{op} sm_{arch} {identity(launch)}"


@functools.cache
def _state() -> str:
    """Another as soon as a kernel, what reads it, Triton or an assembler is another."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars

    from ..kernels._launch import FOLDER

    files = [*FOLDER.glob("*.py"), *HERE.glob("kernel_*.py")]
    tools = [f"{tool.path} {tool.version}" for tool in map(assembler, (80, 90, 100))]
    settings = json.dumps(get_cache_invalidating_env_vars(), sort_keys=True)
    said = "\0".join([digest(*sorted(files)), triton.__version__, settings, *tools])
    return hashlib.sha256(said.encode()).hexdigest()[:16]
