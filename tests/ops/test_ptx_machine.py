"""The machine that runs PTX (tests/support/ptx) notices what a kernel may not do: each fault is put
into a few lines of PTX, or into a kernel that Triton compiled, and has to be named."""

import re

import pytest
import torch
from proof import poisoned

pytest.importorskip("triton")
from ptx.machine import Fault, executed, run
from ptx.program import Unknown

pytestmark = pytest.mark.compiles

HEAD = """.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u64 .ptr .global .align 1 k_param_1,
	.param .u64 .ptr .global .align 1 k_param_2,
	.param .u64 .ptr .global .align 1 k_param_3
)
.reqntid 64
{
	.reg .b32 	%r<9>;
	ld.param.b64 	%rd1, [k_param_0];
	ld.param.b64 	%rd2, [k_param_1];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
	shl.b32 	%r2, %r1, 2;
	xor.b32 	%r3, %r2, 128;
"""
LOAD, STORE = "ld.global.b32 %r4, [%rd4];", "st.global.b32 [%rd5], %r5;"
WRITE, READ, BARRIER = "st.shared.b32 [%r2], %r4;", "ld.shared.b32 %r5, [%r3];", "bar.sync 0;"
COPY = "cp.async.ca.shared.global [%r2], [%rd4], 4;"
SWAP = [LOAD, WRITE, BARRIER, READ, STORE]  # the two warps exchange their numbers


def two_warps(*lines, blocks=1, shared=256, size=64):
    x, y = torch.arange(64.0), torch.full((size,), torch.nan)
    ptx = HEAD + "\n".join(lines) + "\nret;\n$L__func_end0:"
    for reverse in (False, True):
        run(ptx, (blocks,), (x, y), shared, reverse)
    return y


def test_what_is_right():
    swapped = torch.arange(64.0).view(2, 32).flip(0).flatten()
    assert torch.equal(two_warps(*SWAP), swapped)
    arrives = "cp.async.commit_group;", "cp.async.wait_group 0;"
    assert torch.equal(two_warps(COPY, *arrives, BARRIER, READ, STORE), swapped)
    assert two_warps(READ, STORE).isnan().all()  # shared memory that nobody wrote


FAULTS = {
    "race: reads what another warp wrote": [READ, LOAD, WRITE, READ],
    "race: writes what another warp reads": [LOAD, WRITE, READ, STORE],
    "race: writes what another warp wrote": ["and.b32 %r2, %r2, 127;", WRITE],
    "reads what cp.async has not brought": [COPY, "ld.shared.b32 %r5, [%r2];", STORE],
    "ends before cp.async has": [COPY, "cp.async.commit_group;"],
    "outside of shared memory": ["ld.shared.b32 %r5, [%r3+128];"],
    "4 bytes outside of every tensor": ["ld.global.b32 %r4, [%rd4+4];"],
    "misaligned: 8 bytes": ["ld.global.b64 %rd6, [%rd4];"],
    "a jump or barrier by a part of the warp": ["setp.lt.u32 %p1, %r1, 5;", f"@%p1 {BARRIER}"],
    "some warps wait at a barrier": ["setp.lt.u32 %p1, %r1, 32;", f"@%p1 {BARRIER}"],
    "shfl from a lane that takes no part": [
        "setp.lt.u32 %p1, %r1, 5;",
        "@%p1 shfl.sync.bfly.b32 %r5, %r1, 8, 31, -1;",
    ],
    "redux by a part of the warp": [
        "setp.lt.u32 %p1, %r1, 5;",
        "@%p1 redux.sync.add.s32 %r5, %r1, -1;",
    ],
    "does not end": ["$L__BB0_1:", "bra $L__BB0_1;"],
}
FAULTS["race: writes what another warp wrote"].insert(0, "mov.b32 %r4, %tid.x;")


@pytest.mark.parametrize("said", FAULTS)
def test_what_is_wrong(said):
    with pytest.raises(Fault, match=said):
        two_warps(*FAULTS[said])


def test_two_blocks_write_one_place():
    block = "mov.u32 %r5, %ctaid.x;"
    with pytest.raises(Fault, match=r"block \(1, 0, 0\): race: writes what another warp wrote"):
        two_warps(block, STORE, blocks=2)


@pytest.mark.parametrize("name", ["foo.b32", "redux.nor.s32"])
def test_an_unknown_instruction_is_named(name):
    """That of a known kind, too: the machine has no handler for it, and ended the process."""
    text = f"{name.replace('.', '.sync.', 1)} %r1, %r2, -1;"
    with pytest.raises(Unknown, match=f"no instruction {name}.*{text[:-1]}"):
        two_warps(text)


@pytest.mark.parametrize("join", ["add", "min", "max"])
def test_what_is_joined_of_a_warp(join):
    joined = f"redux.sync.{join}.s32 %r5, %r4, -1;"
    x = torch.arange(64).view(2, 32) - 40
    given = {"add": x.sum(1), "min": x.amin(1), "max": x.amax(1)}[join].repeat_interleave(32)
    there = two_warps("sub.s32 %r4, %r1, 40;", joined, STORE).view(torch.int32)
    assert torch.equal(there, given.int())


# --- a kernel of ours, broken ---------------------------------------------------------------------


def linear(change=lambda ptx: ptx, *, n=80, d=64):
    from tab.kernels import linear

    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(1, n, 2, d, generator=generator).bfloat16() for _ in range(3))
    q, k, v = (x.transpose(1, 2) for x in drawn)
    state = torch.rand(1, 2, d, d, generator=generator), torch.rand(1, 2, d, generator=generator)
    with executed(80, change=change), poisoned():
        return linear.forward(q, k, v, torch.ones(1, n).bool(), *state, 0, False, 0.0)


def without(pattern, which):
    """A change of PTX: the which-th instruction of this pattern is gone."""

    def change(ptx):
        match = list(re.finditer(pattern, ptx))[which]
        return ptx[: match.start()] + ptx[match.end() :]

    return change


def found(pattern):
    counts = []
    linear(lambda ptx: counts.append(len(re.findall(pattern, ptx))) or ptx)
    return counts[0]


def noticed(change):
    try:
        linear(change)
    except Fault as fault:
        return bool(re.search("race|cp.async", str(fault)))
    return False


def test_each_barrier_is_missed():
    """All but those that Triton sets to be safe: one at the end of a loop whose next turn begins
    with another."""
    pattern = r"bar\.sync\s+0;"
    barriers = found(pattern)
    missed = [i for i in range(barriers) if not noticed(without(pattern, i))]
    assert barriers >= 8 and len(missed) <= barriers // 8, (barriers, missed)


def test_each_wait_for_a_copy_is_missed():
    pattern = r"cp\.async\.wait_group\s+\d+;"
    waits = found(pattern)
    assert waits and all(noticed(without(pattern, i)) for i in range(waits))


def test_more_tokens_than_there_are():
    """A bound that is too large reads and writes beyond the tensors."""
    with pytest.raises(Fault, match="outside of every tensor"):
        linear(lambda ptx: re.sub(r"(ld\.param\.b32\s+%r\d+, \[linear_fused_param_21\];)",
                                  more_tokens, ptx))  # fmt: skip


def more_tokens(match):
    register = re.search(r"%r\d+", match[1])[0]
    return f"{match[1]}\n\tadd.s32 {register}, {register}, 64;"
