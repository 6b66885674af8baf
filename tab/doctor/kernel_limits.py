"""What a compiled kernel may take, and which ones are known to take more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Known(NamedTuple):
    """What is borne of a kernel: on one architecture or on all, in some configurations or in all.

    where: of the compile-time arguments by name, and "without", the names of those that are None.
    """

    kernel: str
    what: Any  # bytes, or the reason
    arch: int | None = None
    where: Callable[[dict], bool] | None = None

    def holds(self, row: dict) -> bool:
        return (
            self.kernel in row["kernel"].split()
            and self.arch in (None, row["arch"])
            and (self.where is None or self.where(_configuration(row)))
        )


def causal(x: dict) -> bool:
    return x["CAUSAL"]


def wide(x: dict) -> bool:
    """Heads wider than 64."""
    return max(x["D"], x["DV"]) > 64


def widest(x: dict) -> bool:
    """Of gated linear attention: 128 in float32, 256 in float16."""
    return (x["PRECISION"], x["D"]) in (("tf32x3", 128), ("tf32", 256))


def divided(x: dict) -> bool:
    """Normalized gated linear attention."""
    return "den" not in x["without"]


def bent(x: dict) -> bool:
    """With a cap and slopes."""
    return not x["without"] & {"slopes", "cap"}


# Bytes of local memory a thread that are known and borne; few elsewhere; the larger of Triton 3.6
# and 3.8. The causal kernels of performer hold pairs, features and their shifts beside the sums,
# and a second way for extreme keys. The backward of mla holds K, V, dK and dV: too much for tf32x3
# at D 64, and for an A100; that of sparse two sums of 128 columns. Both also look for NaN in the
# tile that meets itself, which mla's widest float32 has no registers for. The kernels of gated
# linear attention hold 32 rows or columns of a state at their widest.
SPILLS = (
    Known("mla_forward", 256, 80),
    Known("mla_grad_kv", 640, 80),
    Known("mla_grad_kv", 896, 80, bent),
    Known("mla_grad_kv", 192, 90),
    Known("mla_grad_kv", 320, 100),
    Known("mla_grad_q", 640, 80),
    Known("mla_grad_q", 256, 90),
    Known("mla_grad_q", 256, 100),
    Known("sparse_grad_kv", 256, 80),
    Known("sparse_grad_kv", 256, 90),
    Known("gated_walk", 768, 80, widest),
    Known("gated_walk", 256, 90, widest),
    Known("gated_pull", 640, None, widest),
    Known("gated_pull", 256, None, divided),
    Known("gated_pull", 384, None, lambda x: divided(x) and wide(x)),
    Known("gated_pull", 768, None, lambda x: divided(x) and widest(x)),
    Known("gated_push", 384, 100, divided),
    Known("gated_push", 512, None, widest),
    Known("gated_push", 256, 100),
    Known("performer_fused", 512),
    Known("performer_states", 256),
    Known("performer_outputs", 640, None, causal),
    Known("performer_queries", 448, None, causal),
    Known("performer_keys", 1152, None, causal),
    Known("performer_pull", 256, 80),
    Known("performer_push", 384),
)
FEW = 128

# Why a multiprocessor may hold one block of a kernel alone, of fewer than WARPS warps: while they
# wait at a barrier or for memory, nothing else runs.
WARPS = 16
SPLIT = "each operand is held as two of tf32: eight warps share a tile, and its sums fill registers"
WIDE = "heads wider than 64: eight warps share a tile of 128 columns, or of several pieces"
STATE = "heads wider than 64: eight warps share 32 rows or columns of a state and all of the others"
EXPANDED = "K, V and sums of a head are expanded from latents, on chip alone"
PAIRS = "a state and the pairs of a tile; with 128 registers it spills up to 216 bytes"
TWO = "two states, two tiles of features and their pairs; with four warps 500 bytes would spill"
LATENTS = "a tile of latents 512 wide serves as keys and as values"
SLOTS = "512 slots and their scores lie in the registers of one block"
SM_80 = "products take their operands from registers"
MOST = "one block a head; its shared memory is the most that any number of tokens asks for"
ALONE = (
    Known("h2o_scan", SLOTS, None, lambda x: x["BS"] >= 512),
    *(Known(x, EXPANDED) for x in ("mla_forward", "mla_grad_kv", "mla_grad_q")),
    Known("mla_decode_split", LATENTS, None, lambda x: x["R"] >= 512),
    *(Known(x, PAIRS, None, causal) for x in ("linear_pull", "linear_push")),
    *(Known(x, TWO) for x in ("performer_pull", "performer_push")),
    *(Known(x, SM_80, 80) for x in ("linear_pull", "linear_fused_backward")),
    *(Known(x, STATE, None, wide) for x in ("gated_walk", "gated_pull", "gated_push")),
    *(
        Known(f"{op}_{kernel}", WIDE, None, wide)
        for op in ("local", "sparse")
        for kernel in ("forward", "grad_q", "grad_kv")
    ),
    Known("cuda", MOST),
)


def faults(rows: list[dict]) -> list[str]:
    """A sentence for each row of the report that takes more than it may."""
    return [f"{_name(row)}: {what}" for row in rows for what in _faults(row)]


def _faults(row: dict) -> list[str]:
    found = []
    if row["shared"] > row["limit"]:
        found.append(f"{row['shared']} bytes of shared memory, of {row['limit']}")
    known = max((x.what for x in SPILLS if x.holds(row)), default=FEW)
    if row["spilled"] > known:
        found.append(f"{row['spilled']} bytes spilled a thread, {known} are known")
    if row["blocks"] < 2 and row["warps"] < WARPS and not _alone(row):
        found.append(f"{row['blocks']} block of {row['warps']} warps on a multiprocessor")
    return found


def _alone(row: dict) -> str | None:
    """Why it may be alone on a multiprocessor."""
    if row["precision"] == "tf32x3":
        return SPLIT
    return next((x.what for x in ALONE if x.holds(row)), None)


def _configuration(row: dict) -> dict:
    pairs = (x.split("=") for x in row["config"].split() if "=" in x)
    numbers = {"True": True, "False": False}
    found = {x: int(y) if y.isdigit() else numbers.get(y, y) for x, y in pairs}
    return found | {"without": {*row["without"].split()}}


def _name(row: dict) -> str:
    return f"{row['op']}: {row['kernel']}, sm_{row['arch']}, {row['config']}"
