"""What assemblers make of the PTX that Triton compiles: each of several takes it, and none touches
a register that an asynchronous product of matrices still needs."""

import re

import pytest
from assemblers import ASSEMBLERS, NEWER, TooOld, assemble, version
from every import EVERY
from sass import disassembled, hazards

from tab.doctor.kernel_compile import code_of
from tab.doctor.kernel_launches import chosen, heaviest, launches, name
from tab.doctor.kernel_report import SHARED_LIMIT

pytest.importorskip("triton")
pytestmark = pytest.mark.compiles
HOPPER = 90  # the only one whose products are asynchronous and lie in registers


def one_of_each(arch):
    """The heaviest launch of each kernel."""
    return [x for found in launches(arch).values() for x in heaviest(found, name)]


@pytest.mark.parametrize(
    "which, arch",
    [(x, arch) for x in ASSEMBLERS for arch in SHARED_LIMIT if x != NEWER or arch == HOPPER],
)
def test_other_assemblers(which, arch):
    ptxas = ASSEMBLERS[which]()
    if ptxas is None:
        pytest.skip(f"not on this machine: the ptxas of {which}")
    for launch in one_of_each(arch):
        try:
            cubin = assemble(ptxas, code_of(launch, arch).asm["ptx"])
        except TooOld as error:
            pytest.skip(str(error))
        found = hazards(disassembled(cubin)) if arch == HOPPER else []
        assert not found, f"{launch.kernel.__name__}, ptxas {version(ptxas)}: {found[:3]}"


def test_no_hazard_in_what_triton_assembles():
    """Most of them have asynchronous products. Each op by itself: that none of them touches a
    register too early is not said by another that asks for more."""
    products = 0
    for launch in (x for op in launches(HOPPER) for x in chosen(HOPPER, EVERY, {op})[op]):
        text = disassembled(code_of(launch, HOPPER).asm["cubin"])
        found = hazards(text)
        assert not found, f"{launch.kernel.__name__} {launch.options}: {found[:3]}"
        products += bool(re.search(r"\bHGMMA\.", text))
    assert products > 20


def test_each_wait_that_is_gone_is_missed():
    launch = next(x for x in one_of_each(HOPPER) if x.kernel.__name__ == "local_forward")
    text = disassembled(code_of(launch, HOPPER).asm["cubin"])
    waits = list(re.finditer(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x\d", text))
    assert waits and not hazards(text)
    for wait in waits:
        assert hazards(text[: wait.start()] + "NOP" + text[wait.end() :])


LINES = [
    "HGMMA.64x16x16.F32.BF16 R24, R8, gdesc[UR4], R24, gsb0",  # D: R24 to R31, A: R8 to R11
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
]
TOUCHING = [
    "MOV R24, RZ",
    "MOV R11, RZ",
    "FADD R2, R31, R3",
    "STS.128 [R2], R28",
    "LDS.128 R20, [R24]",
    "SHFL.BFLY PT, R9, R2, 0x1, 0x1f",
    "IMAD.WIDE R10, R2, R3, R4",
    "FSETP.GT.AND P0, PT, R30, R3, PT",
]
HARMLESS = [
    "MOV R32, RZ",
    "FADD R2, R8, R3",  # A may be read
    "STS.128 [R2], R8",
    "HGMMA.64x16x16.F32.BF16 R24, R12, gdesc[UR4], R24, gsb0",  # sums follow one another
    "UMOV UR24, UR25",
]


def sass(*lines):
    return "\n".join(f"        /*{16 * k:04x}*/  {line} ;" for k, line in enumerate(lines))


@pytest.mark.parametrize("line", TOUCHING + HARMLESS)
def test_what_touches_a_register(line):
    first, wait = LINES
    assert bool(hazards(sass(first, line, wait))) == (line in TOUCHING)
    assert not hazards(sass(first, wait, line))


def test_on_every_path():
    """Around a loop, and past a wait for all groups but one."""
    first, wait = LINES
    label = ".L_x_0:\n"
    loop = label + sass("FADD R2, R24, R3", first, "@P0 BRA `(.L_x_0)", wait)
    assert len(hazards(loop)) == 1
    other = "HGMMA.64x16x16.F32.BF16 R40, R12, gdesc[UR4], R40, gsb0"
    all_but_one = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    assert not hazards(sass(first, other, all_but_one, "MOV R24, RZ"))
    assert hazards(sass(first, other, all_but_one, "MOV R40, RZ"))
