"""What the calls that the kernels' files name need at least on an H100: a static roofline.

    floor = max(bytes / bandwidth, FLOPs / rate)

bytes: the operands and results of the call, each once. FLOPs: of the formula (`Op.flops`). moved:
the operands of all its launches, each once a launch; what exceeds `bytes` goes to memory and back
between launches, or stays in the L2 cache. Products that PyTorch makes around the launches, as for
latent attention, are in FLOPs and not in `moved`. Nothing is compiled or runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

import torch

from .kernel_launches import Launch, calls, precision, triton_type

# NVIDIA, "H100 Tensor Core GPU Architecture", tables 1 to 3: the H100 SXM5, without sparsity. No
# other number of a GPU stands in TAB's code but the limits in kernel_report.py and ISSUED in
# bench/launches.py. float32 is three products of tf32 (kernels/_launch.py).
GPU = "H100 SXM5"
BANDWIDTH = 3.35e12  # bytes/s
RATES = {"bf16": 989.4e12, "fp16": 989.4e12, "tf32": 494.7e12, "tf32x3": 494.7e12 / 3}  # FLOP/s


def call_floors(arch: int = 90, ops: Set[str] | None = None) -> list[dict]:
    """One row a call of kernels/: op, size (of its first operand), type, launches, flops, bytes,
    moved, bound ("memory" or "arithmetic"), floor_us, and of each launch its kernel, its bytes and
    the µs that they take.

    ops: only these, by the names of their files in kernels/.
    """
    from ..ops import OPS

    rows = []
    for name, op, case, launched, results in calls(arch):
        if ops is not None and op not in ops:
            continue
        count, moved = OPS[name].flops, [size(launch.args) for launch in launched]
        raw = hasattr(count, "_get_raw")  # it is given tensors, of whose lengths it makes its sum
        shapes = (tuple(x.shape) if isinstance(x, torch.Tensor) and not raw else x for x in case)
        flops = count(*shapes)
        rows.append(_row(name, case, launched, flops, size(case) + size(results), moved))
    return rows


def _row(name, case, launched: list[Launch], flops: int, least: int, moved: list[int]) -> dict:
    how = next((precision(x) for x in launched if "PRECISION" in x.options), None)
    memory, arithmetic = least / BANDWIDTH, flops / RATES[how] if flops else 0.0
    first = next(x for x in case if isinstance(x, torch.Tensor))
    return {
        "op": name, "size": "×".join(map(str, first.shape)),
        "type": triton_type(first)[1:], "flops": flops, "bytes": least,
        "moved": sum(moved), "bound": "memory" if memory >= arithmetic else "arithmetic",
        "floor_us": 1e6 * max(memory, arithmetic),
        "launches": [
            {"kernel": x.kernel.__name__, "bytes": n, "memory_us": 1e6 * n / BANDWIDTH}
            for x, n in zip(launched, moved, strict=True)
        ],
    }  # fmt: skip


def size(tensors: Iterable) -> int:
    """Bytes of the tensors among these."""
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))
