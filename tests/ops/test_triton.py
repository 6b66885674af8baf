"""The Triton kernels without a GPU: interpreted on a CPU (numbers), and compiled for three
architectures (resources)."""

import re

import pytest
import torch
from every import EVERY, FORMS
from interpreting import interpreting
from paths import ROOT, SUPPORT

from tab.doctor.kernel_launches import chosen, distinct, form, heaviest, launches, name, recorded
from tab.doctor.kernel_limits import faults
from tab.doctor.kernel_report import SHARED_LIMIT, compiled, report_rows

pytest.importorskip("triton")

INTERPRETED = sorted(path.stem for path in (SUPPORT / "interpreted").glob("*.py"))
# Of forms each op is a test of its own: two processes share them evenly.
OPS_APART = sorted(launches(90)) if FORMS else [None]


def test_every_launcher_is_interpreted():
    launching = {path.stem for path in (ROOT / "kernels").glob("[!_]*.py")}
    assert {name.removesuffix("_backward") for name in launching} <= set(INTERPRETED)


@pytest.fixture(scope="module")
def interpret(tmp_path_factory):
    with interpreting(tmp_path_factory.mktemp("interpreted")) as run:
        yield run


@pytest.mark.slow
@pytest.mark.parametrize("op", INTERPRETED)
def test_interpreted(op, interpret):
    code, printed = interpret(op)
    assert code == 0, printed[-7000:]
    assert " passed" in printed
    assert "skipped" not in printed


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_kernel_has_cases_that_are_compiled(arch):
    assert {name(x) for found in chosen(arch).values() for x in found} >= launched_kernels()


@pytest.mark.compiles
@pytest.mark.parametrize("op", OPS_APART)
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_compiled(arch, op):
    """Every kernel, compiled for A100, H100 and B100, fits and spills no more than is known."""
    if op is None:
        rows = report_rows((arch,), every=EVERY)
    else:
        rows = [compiled(op, launch, arch) for launch in heaviest(launches(arch)[op], form)]
    assert {row["arch"] for row in rows} == {arch}
    assert not faults(rows)


def launched_kernels() -> set[str]:
    """The kernels that a launcher names: launch(NAME, …"""
    files = (ROOT / "kernels").glob("*.py")
    return {x for file in files for x in re.findall(r"launch\(\s*(\w+), \(", file.read_text())}


@pytest.mark.compiles
def test_compiled_ones():
    """Triton compiles an integer 1 in, as a constant: no kernel may want a tensor there."""
    found = distinct([launch for call in calls_of_ones() for launch in recorded(*call)[0]])
    assert {x.kernel.__name__ for x in found} >= launched_kernels() - {"assemble_images"}
    for launch in found:
        assert compiled("ones", launch, 90)["registers"] > 0


def calls_of_ones():
    """One batch entry, head, feature, expert; of tokens one, or the fewest for other kernels."""
    from tab.kernels import (
        gated_linear,
        gated_linear_backward,
        gated_linear_normalized,
        h2o,
        linear,
        linear_backward,
        local,
        local_backward,
        mla,
        mla_backward,
        mla_decode,
        moe,
        performer,
        performer_backward,
        sparse,
        sparse_backward,
    )

    def x(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    half, counts = torch.bfloat16, x(1, dtype=torch.int64)
    yield moe.grouped, x(1, 1), x(1, 1, 1), counts
    yield moe.grouped_outer, x(1, 1), x(1, 1), counts
    yield h2o.choose, x(1, 1, 1, 1), x(1, 1, 1, 1), None, 1, 0, True, 1, 1.0
    for n in (1, 128):  # a tile of few tokens, and several
        pattern = [x(*shape, dtype=torch.int32) for shape in ((1, n + 1), (n,)) * 2]
        for rules in ((None, None), (x(1, n, dtype=torch.bool), x(1))):
            window = *rules, 1, 1, 1, 1, True, 1.0, 1.0 if rules[1] is not None else 0.0
            listed = *pattern, *rules, 1, True, 1.0, window[-1]
            q, lse = x(1, 1, n, 16), x(1, 1, n)
            yield local.forward, q, q, q, *window
            yield local_backward.backward, q, q, q, q, q, lse, *window
            yield sparse.forward, q, q, q, *listed
            yield sparse_backward.backward, q, q, q, q, q, lse, *listed
    # In bfloat16 up to 16 tokens are multiplied as tf32, by other kernels.
    for n, dtype in ((1, torch.float32), (17, half), (300, half)):  # and two segments
        q, lse, z = x(1, 1, n, 16, dtype=dtype), x(1, 1, n), x(1, 1, 1)
        s, w = x(1, 1, 16, 16), x(1, 16)
        for kernel, causal in ((0, True), (1, False)):
            options = *(None,) * 3, kernel, causal, 1.0
            yield linear.forward, q, q, q, *options
            given = q, None, None, q, q, q, q, s, s[..., 0]
            yield linear_backward.backward, *given, *options
            options = *(None,) * 4, kernel, causal
            yield performer.forward, q, q, q, w, *options, 0.0
            given = q, None, None, q, q, q, w, q, x(1, 1, 1, 16), z, z, lse
            yield performer_backward.backward, *given, *options
        given = q, q, q, x(1, 1, n, 1), None, None, 1.0
        yield gated_linear.forward, *given
        yield gated_linear_backward.backward, q, None, *given
        *given, _ = given
        yield gated_linear_normalized.forward, *given, None
        given = q, None, None, *given[:4], q, lse, None, None, None
        yield gated_linear_normalized.backward, *given
        c, u = x(1, n, 16, dtype=dtype), x(1, 16, 16, dtype=dtype)
        latent = q, q, c, c, u, u
        for rules in ((None, None, 1.0, True, 0.0), (None, x(1), 1.0, True, 1.0)):
            yield mla.bent_forward, *latent, *rules
            yield mla_backward.bent_backward, q, lse, *latent, q, lse, *rules
        given = q[:, :, 0], q[:, :, 0], x(1, 2 * n, 32, dtype=dtype), counts, u, u, 1.0
        yield mla_decode.decode, *given
