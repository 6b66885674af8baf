"""What the machine code of sm_90 does to registers that asynchronous products still need.

HGMMA returns at once. Until a WARPGROUP.DEPBAR has waited for its group, nobody may read or write
its sum D or write its operand A, where that lies in registers (PTX ISA, wgmma.mma_async; a group
ends with the HGMMA that names gsb0). Assemblers have had this wrong.
Shared memory is not looked at."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

NO_RESULT = ("ST", "RED", "BAR", "WARPGROUP", "WARPSYNC", "DEPBAR", "BRA", "EXIT", "NOP", "FENCE",
             "MEMBAR", "BSSY", "BSYNC", "LDGSTS", "LDGDEPBAR", "R2UR", "ISETP", "FSETP", "PLOP3",
             "HGMMA", "CCTL", "RET", "CALL", "R2P", "ERRBAR", "YIELD", "SYNCS", "UTMA")  # fmt: skip
TWO = ("DADD", "DMUL", "DFMA", "CS2R")  # whose results are 64 bits wide


class Instruction(NamedTuple):
    guarded: bool
    name: str
    operands: list[str]
    text: str


def disassembled(cubin: bytes) -> str:
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-c", "-hex", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and where each label stands among them."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := re.match(r"\s*(\.L_\w+):", line):
            labels[match[1]] = len(code)
        elif match := re.match(
            r"\s+/\*[0-9a-f]{4,}\*/\s+((@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*?))\s*;", line
        ):
            said, guard, name, rest = match.groups()
            operands = [x.strip() for x in rest.split(",")] if rest.strip() else []
            code.append(Instruction(bool(guard), name, operands, said))
    return code, labels


def registers(operand: str, count: int = 1) -> set[int]:
    """R8 and those that follow it; none of RZ, UR4, gdesc[UR4]"""
    found: set[int] = set()
    for match in re.finditer(r"(?<![\w])R(\d+)(\.64)?", operand):
        found |= set(range(int(match[1]), int(match[1]) + max(count, 2 if match[2] else 1)))
    return found


def width(name: str) -> int:
    """Registers of what an instruction loads, stores or computes."""
    if ".128" in name:
        return 4
    if name.startswith("LDSM"):
        return 4 if name.endswith(".4") else 2 if name.endswith(".2") else 1
    two = name.startswith(TWO) and ".32" not in name
    return 2 if two or ".64" in name or ".WIDE" in name else 1


def result(i: Instruction) -> int:
    """Which operand it is: predicates may stand before it. After the last one if there is none."""
    if i.name.startswith(NO_RESULT):
        return len(i.operands)
    places = (k for k, x in enumerate(i.operands) if not re.fullmatch(r"!?U?P(\d|T)", x))
    return next(places, len(i.operands))


def written(i: Instruction) -> set[int]:
    return registers(i.operands[k], width(i.name)) if (k := result(i)) < len(i.operands) else set()


def read(i: Instruction) -> set[int]:
    """All operands but the result; what is stored may be wide."""
    found: set[int] = set()
    for k, operand in enumerate(i.operands):
        if k != result(i):
            stored = i.name.startswith("ST") and k == len(i.operands) - 1
            found |= registers(operand, width(i.name) if stored else 1)
    return found


def product(i: Instruction) -> tuple[set[int], set[int]]:
    """The registers of an HGMMA's D, and of its A if it lies there."""
    columns = int(re.match(r"HGMMA\.64x(\d+)x", i.name)[1])
    return registers(i.operands[0], columns // 2), registers(i.operands[1], 4)


def hazards(text: str) -> list[str]:
    """Sentences on what is touched too early, on any path."""
    code, labels = parse(text)
    found = []
    for start, i in enumerate(code):
        if i.name.startswith("HGMMA"):
            d, a = product(i)
            for other in in_flight(code, labels, start):
                if other.name.startswith("HGMMA"):
                    touched = product(other)[0] & a
                else:
                    touched = (written(other) & (a | d)) | (read(other) & d)
                if touched and other is not i:
                    found.append(f"{other.text} touches R{min(touched)} of {i.text}")
    return list(dict.fromkeys(found))  # once, on however many paths


def in_flight(code: list[Instruction], labels: dict[str, int], start: int) -> Iterator[Instruction]:
    """What may be executed before the product that code[start] begins is waited for."""
    open_ = -1  # its own group has not been closed yet; then the groups closed after it
    todo = [(start + 1, 0 if "gsb0" in code[start].text else open_)]
    seen = set()
    while todo:
        k, after = todo.pop()
        if (k, after) in seen or k >= len(code):
            continue
        seen.add((k, after))
        i = code[k]
        if i.name.startswith("WARPGROUP.DEPBAR"):
            most = int(i.operands[-1], 0)  # groups that may be in flight still
            if after >= most:
                continue
        yield i
        if i.name.startswith("HGMMA") and "gsb0" in i.text:
            after = min(after + 1, 8)
        if i.name.startswith("BRA"):
            label = re.search(r"\.L_\w+", i.text)[0]
            todo.append((labels[label], after))
            if not i.guarded and not re.search(r"\bU?P\d", i.text):
                continue
        if i.name.startswith("EXIT") and not i.guarded:
            continue
        todo.append((k + 1, after))
