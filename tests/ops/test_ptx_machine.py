"""The machine that runs PTX (tests/support/ptx) notices what a kernel may not do: each fault is put
into a few lines of PTX, or into a kernel that Triton compiled, and has to be named."""

import functools
import itertools
import re

import pytest
import torch
from proof import poisoned

from tab.doctor.kernel_compile import code_of
from tab.doctor.kernel_launches import Launch

pytest.importorskip("triton")
from ptx.machine import Fault, run
from ptx.program import Unknown

from tab.kernels._launch import recording

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


@pytest.mark.parametrize("constant, stored", [("-1", True), ("1", True), ("0", False)])
def test_a_predicate_that_is_constant(constant, stored):
    """-1 is true of each lane, and its opposite of none."""
    lines = f"mov.pred %p1, {constant};", LOAD, "mov.b32 %r5, %r4;", "@!%p1 bra $L__BB0_1;"
    y = two_warps(*lines, STORE, "$L__BB0_1:")
    assert torch.equal(y, torch.arange(64.0)) if stored else y.isnan().all()


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


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_numbers_of_16_bits_are_compared_as_such(kind):
    """Bits of negative ones, taken as integers, are greater than those of positive ones."""
    lines = LOAD, f"add.f32 %r4, %r4, 0f{0xC2200000:X};", f"cvt.rn.{kind}.f32 %rs1, %r4;"
    x = torch.arange(64.0) - 40
    for compared, kept in (
        (f"setp.gt.{kind} %p1, %rs1, 0;", x > 0),
        (f"setp.ge.{kind} %p1, 0, %rs1;", x <= 0),
    ):
        y = two_warps(*lines, compared, "selp.b32 %r5, %r4, 0, %p1;", STORE)
        assert torch.equal(y, torch.where(kept, x, 0.0))
    sizes = f"abs.{kind} %rs2, %rs1;", f"cvt.f32.{kind} %r5, %rs2;"
    assert torch.equal(two_warps(*lines, *sizes, STORE), x.abs())


@pytest.mark.parametrize("join", ["add", "min", "max"])
def test_what_is_joined_of_a_warp(join):
    joined = f"redux.sync.{join}.s32 %r5, %r4, -1;"
    x = torch.arange(64).view(2, 32) - 40
    given = {"add": x.sum(1), "min": x.amin(1), "max": x.amax(1)}[join].repeat_interleave(32)
    there = two_warps("sub.s32 %r4, %r1, 40;", joined, STORE).view(torch.int32)
    assert torch.equal(there, given.int())


# --- a kernel of ours, broken ---------------------------------------------------------------------


def drawn(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def linear_fused(n=80, d=64):
    from tab.kernels import linear

    q, k, v = (x.transpose(1, 2) for x in drawn(*((1, n, 2, d),) * 3))
    state = torch.rand(1, 2, d, d), torch.rand(1, 2, d)
    linear.forward(q, k, v, torch.ones(1, n).bool(), *state, 0, False, 0.0)


def mla_forward(slopes=None, cap=0.0, n=80, d=16, r=128):
    from tab.kernels import mla

    sizes = (1, 1, n, d), (1, 1, n, d), (1, n, r), (1, n, d), (1, d, r), (1, d, r)
    mla.bent_forward(*drawn(*sizes), None, slopes, 0.1, False, cap)


def bent_mla_forward():
    mla_forward(torch.ones(1), 30.0)


def mla_decode_split(h=16, n=160, r=64):
    from tab.kernels import mla_decode

    sizes = (1, h, 32), (1, h, 16), (1, n, r + 16), (h, 32, r), (h, 32, r)
    q, q_rope, cache, *weights = drawn(*sizes)
    mla_decode.decode(q, q_rope, cache, torch.tensor([n]).int(), *weights, 0.1)


def performer_fused(n=144, d=80, features=80, causal=False):
    from tab.kernels import performer

    q, k, v, w = drawn(*((1, 1, n, d),) * 3, (features, d))
    if causal:
        k[:, :, :7] *= 8
    return q, k, v, w.float(), performer.forward(q, k, v, w.float(), *(None,) * 4, 0, causal, 0.0)


def performer_walk():
    """Two tiles of tokens, the first with keys that are far apart; two blocks of features."""
    return performer_fused(48, 16, 80, True)


def performer_backward():
    from tab.kernels import performer_backward

    *x, outs = performer_walk()
    performer_backward.backward(x[2], None, None, *x, *outs, *(None,) * 4, 0, True)


def gated_walk(n=80, d=64):
    from tab.kernels import gated_linear

    q, k, v = drawn(*((1, 1, n, d),) * 3)
    given = q, k, v, -torch.rand(1, 1, n, 1), torch.ones(1, n).bool(), torch.rand(1, 1, d, d), 0.3
    gated_linear.forward(*given)
    return given


def gated_backward():
    from tab.kernels import gated_linear_backward

    given = gated_walk(48)
    gated_linear_backward.backward(given[2], given[5], *given)


def local_forward(n=144):
    """With a mask, slopes and a cap; both edges of the window, and a tile between them."""
    from tab.kernels import local

    x = drawn(*((1, 1, n, 16),) * 3)
    local.forward(*x, torch.ones(1, n).bool(), torch.ones(1), 80, 96, 0, 0, False, 0.3, 30.0)


KERNELS = {  # the kernel that is broken -> what launches it
    "linear_fused": linear_fused,
    "mla_forward": mla_forward,
    "mla_forward, bent": bent_mla_forward,
    "mla_decode_split": mla_decode_split,
    "performer_fused": performer_fused,
    "performer_walk": performer_walk,
    "performer_pull": performer_backward,
    "performer_push": performer_backward,
    "gated_walk": gated_walk,
    "gated_pull": gated_backward,
    "gated_push": gated_backward,
    "local_forward": local_forward,
}


@functools.cache
def launched(f) -> dict[str, tuple]:
    """Kernel -> its PTX, grid, arguments and shared memory; all have run, unbroken."""
    found = {}

    def execute(kernel, grid, *args, **options):
        launch = Launch(kernel, args, options)
        code = code_of(launch, 80)
        given = [x for x, kind in zip(args, launch.types, strict=True) if kind != "constexpr"]
        found[kernel.__name__] = code.asm["ptx"], grid, given, code.metadata.shared
        run(*found[kernel.__name__])

    with recording(execute, 80), poisoned():
        f()
    return found


def run_changed(kernel, change):
    ptx, *rest = launched(KERNELS[kernel])[kernel.split(",")[0]]
    run(change(ptx), *rest)


def without(pattern, *which):
    """A change of PTX: of the instructions of this pattern those of these numbers are gone."""

    def change(ptx):
        count = itertools.count()
        return re.sub(pattern, lambda match: "" if next(count) in which else match[0], ptx)

    return change


def found(kernel, pattern):
    return len(re.findall(pattern, launched(KERNELS[kernel])[kernel.split(",")[0]][0]))


def noticed(kernel, change):
    try:
        run_changed(kernel, change)
    except Fault as fault:
        return bool(re.search("race|cp.async", str(fault)))
    return False


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_barrier_is_missed(kernel):
    """Once those are gone that Triton sets to be safe: one at the end of a loop whose next turn
    begins with another, or between what a warp writes and what the same warp reads. Of gated
    kernels those are more, where each warp forms the decays of a tile for itself. Of two of which
    either is enough one goes, and the other is then missed."""
    pattern = r"bar\.sync\s+0;"
    barriers, gone = found(kernel, pattern), []
    for i in range(barriers):
        if not noticed(kernel, without(pattern, *gone, i)):
            gone.append(i)
    assert barriers >= 8 and len(gone) <= barriers // (6 if "gated" in kernel else 8), (
        barriers,
        gone,
    )


@pytest.mark.parametrize("kernel", sorted(KERNELS.keys() - {"performer_push"}))  # which has none
def test_each_wait_for_a_copy_is_missed(kernel):
    pattern = r"cp\.async\.wait_group\s+\d+;"
    waits = found(kernel, pattern)
    assert waits and all(noticed(kernel, without(pattern, i)) for i in range(waits))


def test_more_tokens_than_there_are():
    """A bound that is too large reads and writes beyond the tensors."""
    bound = r"(ld\.param\.b32\s+%r\d+, \[linear_fused_param_21\];)"
    with pytest.raises(Fault, match="outside of every tensor"):
        run_changed("linear_fused", lambda ptx: re.sub(bound, more_tokens, ptx))


def more_tokens(match):
    register = re.search(r"%r\d+", match[1])[0]
    return f"{match[1]}\n\tadd.s32 {register}, {register}, 64;"
