"""The launches that the kernel report compiles: what each launcher of kernels/ would launch for the
cases that its own file ends with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Launch(NamedTuple):
    kernel: Callable
    args: tuple  # positional; tensors on the meta device
    options: dict  # compile-time arguments, warps and stages

    @property
    def types(self) -> list[str]:
        return [triton_type(x) for x in self.args]


def launches(arch: int) -> dict[str, list[Launch]]:
    """Op -> its distinct launches on an architecture; NAME_backward.py counts with NAME."""
    from ..kernels._launch import LAUNCHERS, load

    load()
    found: dict[str, list[Launch]] = {}
    for launcher in LAUNCHERS.values():
        op = launcher.run.__module__.rpartition(".")[2].removesuffix("_backward")
        for case in launcher.cases():
            found.setdefault(op, []).extend(recorded(launcher.run, *case, arch=arch))
    return {op: distinct(found[op]) for op in sorted(found)}


def recorded(run: Callable, *args, arch: int = 90) -> list[Launch]:
    """What run(*args) launches on this architecture; nothing runs."""
    from ..kernels._launch import recording

    seen: list[Launch] = []
    with recording(
        lambda kernel, grid, *args, **options: seen.append(Launch(kernel, args, options)), arch
    ):
        run(*args)
    return seen


def identity(launch: Launch) -> str:
    """The same for launches of one kernel with one configuration."""
    return f"{launch.kernel.__name__} {launch.types} {sorted(launch.options.items())}"


def distinct(launches: list[Launch]) -> list[Launch]:
    """Of those that compile to the same code the first."""
    first: dict[str, Launch] = {}
    for launch in launches:
        first.setdefault(identity(launch), launch)
    return list(first.values())


def triton_type(x) -> str:
    """Triton's name of an argument's type; None and 1 are compiled in."""
    if isinstance(x, torch.Tensor):
        short = {
            "float32": "fp32",
            "float16": "fp16",
            "bfloat16": "bf16",
            "uint8": "u8",
            "int8": "i8",
            "int32": "i32",
            "int64": "i64",
        }
        return "*" + short[str(x.dtype).removeprefix("torch.")]
    if x is None or (x == 1 and isinstance(x, int)):
        return "constexpr"
    return "fp32" if isinstance(x, float) else "i32" if abs(x) < 2**31 else "i64"
