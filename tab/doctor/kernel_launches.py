"""The launches that the kernel report compiles: what each launcher of kernels/ would launch for the
cases that its own file ends with."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterator, Set
from typing import NamedTuple

import torch

RULES = ("mask", "slopes", "cap")  # operands that change what is computed of the others


class Launch(NamedTuple):
    kernel: Callable
    args: tuple  # positional; tensors on the meta device
    options: dict  # compile-time arguments, warps and stages

    @property
    def types(self) -> list[str]:
        return [triton_type(x) for x in self.args]

    def __reduce__(self):  # a kernel is known to another process by its name
        kernel = self.kernel
        return _launch_of, (kernel.__module__, kernel.__name__, self.args, self.options)


def _launch_of(module: str, kernel: str, args: tuple, options: dict) -> Launch:
    return Launch(getattr(importlib.import_module(module), kernel), args, options)


class Call(NamedTuple):
    """What one case of a launcher comes to."""

    name: str  # of the operator
    op: str  # the name of its file in kernels/; NAME_backward.py counts with NAME
    case: tuple  # the operator's arguments
    launches: list[Launch]
    results: tuple  # tensors on the meta device


def calls(arch: int) -> Iterator[Call]:
    """What each launcher of kernels/ does on an architecture for each of its cases."""
    from ..kernels._launch import LAUNCHERS, load

    load()
    for op_name, launcher in LAUNCHERS.items():
        op = launcher.run.__module__.rpartition(".")[2].removesuffix("_backward")
        for case in launcher.cases():
            seen, results = recorded(launcher.run, *case, arch=arch)
            given = results if isinstance(results, tuple) else (results,)
            yield Call(op_name, op, case, seen, given)


def launches(arch: int) -> dict[str, list[Launch]]:
    """Op -> its distinct launches on an architecture."""
    found: dict[str, list[Launch]] = {}
    for call in calls(arch):
        found.setdefault(call.op, []).extend(call.launches)
    return {op: distinct(found[op]) for op in sorted(found)}


def recorded(run: Callable, *args, arch: int = 90) -> tuple[list[Launch], object]:
    """What run(*args) launches on this architecture, and its results; nothing runs."""
    from ..kernels._launch import recording

    seen: list[Launch] = []
    with recording(
        lambda kernel, grid, *args, **options: seen.append(Launch(kernel, args, options)), arch
    ):
        return seen, run(*args)


def identity(launch: Launch) -> str:
    """The same for launches of one kernel with one configuration."""
    return f"{name(launch)} {launch.types} {sorted(launch.options.items())}"


def distinct(launches: list[Launch]) -> list[Launch]:
    """Of those that compile to the same code the first."""
    first: dict[str, Launch] = {}
    for launch in launches:
        first.setdefault(identity(launch), launch)
    return list(first.values())


def chosen(arch: int, every: bool = False, ops: Set[str] | None = None) -> dict[str, list[Launch]]:
    """Op -> all of its launches, or those that stand for them: of the same sums, in whichever op,
    all but those of which another asks at least as much in every way. ops: of these alone."""
    found = {op: each for op, each in launches(arch).items() if ops is None or op in ops}
    if every:
        return found
    groups = grouped([x for each in found.values() for x in each], sums)
    kept = {id(x) for group in groups for x in foremost(group)}
    return {op: [x for x in each if id(x) in kept] for op, each in found.items()}


def foremost(group: list[Launch]) -> list[Launch]:
    """Those that no other one stands for; of equals the first."""
    kept: list[Launch] = []
    for launch in sorted(group, key=weight, reverse=True):  # behind what may stand for it
        if not any(stands_for(x, launch) for x in kept):
            kept.append(launch)
    return kept


def stands_for(launch: Launch, other: Launch) -> bool:
    """Whether the launch has each operand of the other and asks for at least as much otherwise. Of
    the 211 of gated linear attention that it leaves out, by Triton 3.8 on three architectures, none
    spilled more than 32 bytes beyond what stands for it, or left fewer warps resident."""
    less = {*without(launch).split()} <= {*without(other).split()}
    return less and all(map(operator.ge, weight(launch), weight(other)))


def heaviest(found: list[Launch], kind: Callable[[Launch], object]) -> list[Launch]:
    """One of each kind: that which asks for most, as far as that shows before it is compiled."""
    return [max(group, key=weight) for group in grouped(found, kind)]


def grouped(found: list[Launch], kind: Callable[[Launch], object]) -> list[list[Launch]]:
    groups: dict[object, list[Launch]] = {}
    for launch in found:
        groups.setdefault(kind(launch), []).append(launch)
    return [*groups.values()]


def without(launch: Launch) -> str:
    """The names of the arguments that are None."""
    pairs = zip(launch.kernel.arg_names, launch.args, strict=False)
    return " ".join(x for x, given in pairs if given is None)


def name(launch: Launch) -> str:
    return launch.kernel.__name__


def form(launch: Launch) -> tuple:
    """The kernel, its precision, and its switches: what is other code rather than other sizes."""
    switches = {x: on for x, on in launch.options.items() if isinstance(on, bool)}
    return name(launch), precision(launch), *sorted(switches.items())


def code(launch: Launch) -> tuple:
    """What is the same for launches of other sizes only."""
    return form(launch), without(launch)


def sums(launch: Launch) -> tuple:
    """What computes the same, but for states that are read or written, or not, and for sizes."""
    return form(launch), *(x for x in RULES if x in without(launch).split())


def precision(launch: Launch) -> str:
    """How it multiplies; of a kernel without products the type that it reads."""
    return launch.options.get("PRECISION") or next(x for x in launch.types if x.startswith("*"))


def weight(launch: Launch) -> tuple:
    """What presses on registers: addresses and what comes with them (masks, slopes), the pairs of a
    causal tile, the elements of its tiles that a thread holds, the columns that it takes in several
    pieces. bfloat16 before all, which is what runs on tensor cores most."""
    options = launch.options
    tiles = {name: size for name, size in options.items() if name.startswith("B")}
    tokens = options.get("BN") or options.get("BM") or 1
    held = tokens * (sum(tiles.values()) - options.get("BN", 0)) / options.get("num_warps", 4)
    return (
        "*bf16" in launch.types,
        sum(kind.startswith("*") for kind in launch.types),
        options.get("CAUSAL", False),
        held,
        max((options[name] for name in ("D", "DN", "R") if name in options), default=0),
    )


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
