"""Reads the PTX of one kernel: each instruction becomes a handler of machine.cpp and the places of
its operands in a warp's registers, where constants and arguments lie too."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

LANES = 32
NONE = 0xFFFFFFFF
PLAIN, BRANCH, RETURN, BARRIER = range(4)  # as in machine.cpp
# How results are rounded is the machine's business: to the nearest where PTX does not name another.
UNSAID = {"rn", "approx", "full", "uni", "sync", "aligned", "ftz", "relaxed", "weak"}
ANY_NUMBER = {"and", "or", "xor", "not", "mov", "selp"}  # whose bits alone matter
WIDTHS = {"p": 1, "rs": 2, "r": 4, "rd": 8}  # bytes of a register by its name
SPECIAL = [f"%{name}.{axis}" for name in ("ctaid", "nctaid") for axis in "xyz"]


class Unknown(Exception):
    """An instruction that the machine does not have."""


class Program:
    """code: (kind, guard, negated, operands or target, handler's name, text) of each instruction;
    pool: the operands; image: the registers as they are at the start."""

    def __init__(self, ptx: str, sizes: Callable[[str], str | None]):
        """sizes: bytes of each operand of a handler, "" where it has a form of its own here."""
        self.sizes = sizes
        self.code: list[tuple[int, int, bool, int, str, str]] = []
        self.pool: list[int] = []
        self.image = bytearray()
        self.places: dict[object, int] = {}
        head, body = re.search(r"\.entry \w+\((.*?)\)(.*?)\$L__func_end", ptx, re.S).groups()
        found = re.findall(r"\.[ubf](\d+)[^\n]*?(\w+)(?:,|$)", head, re.M)
        self.parameters = [(name, int(size) // 8) for size, name in found]
        for name, _ in self.parameters:
            self.place(name, 8)
        self.thread = self.place("%tid.x", 4)
        self.special = [self.place(name, 4) for name in SPECIAL]
        self.threads = int(re.search(r"\.reqntid (\d+)", body)[1])
        self.constant(self.threads, 4, "%ntid.x")
        labels: dict[str, int] = {}
        for label, text, where in statements(body):
            if label:
                labels[label] = len(self.code)
            else:
                self.instruction(text, f"`{text}` ({where})")
        self.code = [
            (kind, guard, no, labels[to] if kind == BRANCH else to, name, text)
            for kind, guard, no, to, name, text in self.code
        ]

    # --- places -----------------------------------------------------------------------------------

    def place(self, name: object, width: int) -> int:
        """Where 32 lanes of so many bytes lie."""
        if name not in self.places:
            self.places[name] = len(self.image)
            self.image += bytes(LANES * width)
        return self.places[name]

    def constant(self, value: int, width: int, name: object = None) -> int:
        value %= 1 << 8 * width
        at = self.place(name or (value, width), width)
        self.image[at : at + LANES * width] = value.to_bytes(width, "little") * LANES
        return at

    def operand(self, text: str, width: int) -> int:
        """The place of a register or a constant that an instruction reads with so many bytes."""
        if text.startswith("%"):
            held = 4 if "." in text else WIDTHS[re.match(r"%([a-z]+)", text)[1]]
            if held != width:
                raise Unknown(f"{text} has {held} bytes, and {width} are wanted")
            return self.place(text, width)
        if text == "global_smem":
            return self.constant(0, width)
        if text.startswith("0f"):
            return self.constant(int(text[2:], 16), width)
        return self.constant(int(text.rstrip("U"), 0), width)

    def address(self, text: str) -> list[int]:
        """[x + n] -> register, its bytes, n"""
        base, offset = re.fullmatch(r"\[\s*([%\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text).groups()
        width = width_of(base) if base.startswith("%") else 4
        return [self.operand(base, width), width, int(offset or "0", 0) % (1 << 32)]

    # --- instructions -----------------------------------------------------------------------------

    def instruction(self, text: str, said: str) -> None:
        guard, no = NONE, False
        if match := re.match(r"@(!?)(%p\d+)\s+(.*)", text):
            no, guard, text = bool(match[1]), self.place(match[2], 1), match[3]
        name, _, rest = text.partition(" ")
        parts = name.split(".")
        operands = split(rest)
        if parts[0] == "bra":
            return self.code.append((BRANCH, guard, no, operands[0], "", said))
        if parts[0] == "ret":
            return self.code.append((RETURN, guard, no, 0, "", said))
        if parts[:2] == ["bar", "warp"]:  # lanes run together here
            return None
        if parts[:2] == ["bar", "sync"] and operands == ["0"]:
            return self.code.append((BARRIER, guard, no, 0, "", said))
        try:
            name, places = self.form(parts, operands)
            if self.sizes(name) is None:
                raise Unknown(f"no instruction {name}")
        except (Unknown, KeyError, ValueError, TypeError, IndexError) as error:
            raise Unknown(f"{error!r} in {said}") from error
        self.code.append((PLAIN, guard, no, len(self.pool), name, said))
        self.pool += places

    def form(self, parts: list[str], operands: list[str]) -> tuple[str, list[int]]:
        """Handler and operands of an instruction."""
        kind = parts[0]
        if parts[-1] == "pred":  # -1, all bits of which are 1, is true; one byte holds it as 1
            operands = [x if x.startswith("%") else str(int(x, 0) and 1) for x in operands]
        special = getattr(self, f"_{kind}", None)
        if special and (found := special(parts, operands)):
            return found
        name = said(parts)
        sizes = self.sizes(name)
        if sizes is None and kind in ANY_NUMBER:
            name = re.sub(r"\.[usf](\d+)$", r".b\1", name)
            sizes = self.sizes(name)
        if sizes is None:
            raise Unknown(f"no instruction {name}")
        widths = map(int, sizes)
        return name, [self.operand(x, w) for x, w in zip(operands, widths, strict=True)]

    def _cvt(self, parts, operands):
        """The source may be wider than its type: the low part counts."""
        held, wanted = width_of(operands[1]), int(self.sizes(said(parts))[1])
        if held > wanted:
            low = self.place(("low", operands[1]), wanted)
            count = held // wanted
            places = [self.place(operands[1], held), held, count, low, *(NONE,) * (count - 1)]
            self.code.append((PLAIN, NONE, False, len(self.pool), "unpack", "the low part"))
            self.pool += places
            return said(parts), [self.operand(operands[0], int(self.sizes(said(parts))[0])), low]
        return None

    def _ld(self, parts, operands):
        if parts[1] == "param":
            to, size = operands[0], int(parts[-1][1:])
            held, width = width_of(to), size // 8
            source = operands[1].strip("[]")
            if held == width:
                return f"mov.b{size}", [self.operand(to, held), self.place(source, held)]
            kind = "s" if parts[-1][0] == "s" else "u"
            return f"cvt.{kind}64.{kind}{size}", [self.operand(to, held), self.place(source, width)]
        return self._access("ld", parts, operands[1], operands[0])

    def _st(self, parts, operands):
        return self._access("st", parts, operands[0], operands[1])

    def _access(self, kind, parts, address, values):
        space = parts[1].removesuffix("::cta")
        names = group(values)
        size = int(parts[-1][1:]) // 8
        places = []
        for name in names:  # a constant has the instruction's type, a register may be wider
            width = width_of(name) if name.startswith("%") else size
            places += self.operand(name, width), width
        signed = int(parts[-1][0] == "s")
        return f"{kind}.{space}", [*self.address(address), size, len(names), signed, *places]

    def _cp(self, parts, operands):
        if "commit_group" in parts:
            return "cp.async.commit_group", []
        if "wait_group" in parts:
            return "cp.async.wait_group", [int(operands[0], 0)]
        if "wait_all" in parts:
            return "cp.async.wait_group", [0]
        to, source, size, *real = operands
        real = real[0] if real else size
        places = [*self.address(to), *self.address(source), int(size, 0), self.operand(real, 4)]
        return "cp.async", places

    def _ldmatrix(self, parts, operands):
        to = group(operands[0])
        name = f"ldmatrix.x{len(to)}" + (".trans" if "trans" in parts else "")
        return name, [*self.address(operands[1]), *(self.operand(x, 4) for x in to)]

    def _mma(self, parts, operands):
        if parts[-1] != "f32" or parts[-4] != "f32" or parts[-3] != parts[-2]:
            raise Unknown("products of other types")
        places = [self.operand(x, 4) for part in operands for x in group(part)]
        return f"mma.{parts[3]}.{parts[-2]}", places

    def _shfl(self, parts, operands):
        to, _, found = operands[0].partition("|")
        found = self.operand(found, 1) if found else NONE
        places = [self.operand(to, 4), found, *(self.operand(x, 4) for x in operands[1:4])]
        return f"shfl.{parts[2]}", places

    def _redux(self, parts, operands):
        return ".".join(("redux", *parts[2:])), [self.operand(x, 4) for x in operands[:2]]

    def _mov(self, parts, operands):
        for name, one, many in (("pack", 0, 1), ("unpack", 1, 0)):
            if operands[many].startswith("{"):
                width = int(parts[1][1:]) // 8
                names = group(operands[many])
                inner = [NONE if x == "_" else self.operand(x, width // len(names)) for x in names]
                return name, [self.operand(operands[one], width), width, len(inner), *inner]
        return None


def said(parts: list[str]) -> str:
    """An instruction's name without what does not matter here."""
    return ".".join(part for part in parts if part not in UNSAID)


def width_of(register: str) -> int:
    return WIDTHS[re.match(r"%([a-z]+)\d", register)[1]]


def group(text: str) -> list[str]:
    """{a, b} -> [a, b]; a -> [a]"""
    return [x.strip() for x in text.strip("{} ").split(",")]


def split(text: str) -> list[str]:
    """Operands, of which some are groups in braces."""
    return [x.strip() for x in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*)", text)]


def statements(body: str) -> Iterator[tuple[str | None, str, str]]:
    """(label or None, instruction, source line)"""
    where = "?"
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.S)
    for line in body.splitlines():
        line, _, comment = line.partition("//")
        line = line.strip()
        if line.startswith(".loc"):
            where = re.match(r"\s*([^:\s]+:\d+)?", comment)[1] or where
        elif match := re.fullmatch(r"(\$\w+):", line):
            yield match[1], "", where
        elif line and line[0] not in ".{})":
            for text in filter(None, (x.strip() for x in line.split(";"))):
                yield None, re.sub(r"\s+", " ", text), where
