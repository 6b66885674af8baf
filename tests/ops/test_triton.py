"""The Triton kernels without a GPU: interpreted on a CPU (numbers), and compiled for three
architectures (resources)."""

import os
import re
import subprocess
import sys

import pytest
import torch
from paths import ROOT, SUPPORT

from tab.doctor.kernel_launches import distinct, launches, recorded
from tab.doctor.kernel_report import SHARED_LIMIT, compiled, report_rows

pytest.importorskip("triton")

INTERPRETED = sorted(path.stem for path in (SUPPORT / "interpreted").glob("*.py"))

# Bytes of local memory a thread that are known and borne, by (kernel, arch) or kernel; few
# elsewhere; the larger of Triton 3.6 and 3.8. The causal kernels of performer hold pairs, features
# and their shifts beside the sums, and a second way for extreme keys. The backward of mla holds K,
# V, dK and dV: too much for tf32x3 at D 64, and for an A100; that of sparse two sums of 128
# columns. Both also look for NaN in the tile that meets itself, which mla's widest float32 has no
# registers for.
SPILLS = {
    ("mla_forward", 80): 256,
    ("mla_grad_kv", 80): 640,
    ("mla_grad_q", 80): 640,
    ("mla_grad_q", 90): 256,
    ("mla_grad_q", 100): 256,
    ("mla_grad_kv", 90): 192,
    ("mla_grad_kv", 100): 320,
    ("sparse_grad_kv", 80): 256,
    ("sparse_grad_kv", 90): 256,
    "performer_fused": 512,
    "performer_states": 256,
    "performer_outputs": 640,
    "performer_queries": 448,
    "performer_keys": 1152,
}
FEW = 128


def test_every_launcher_is_interpreted():
    launching = {path.stem for path in (ROOT / "kernels").glob("[!_]*.py")}
    assert {name.removesuffix("_backward") for name in launching} <= set(INTERPRETED)


@pytest.mark.parametrize("op", INTERPRETED)
def test_interpreted(op):
    """In a process of its own: whether Triton interprets is settled when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"interpreted/{op}.py"]
    done = subprocess.run(
        command,
        cwd=SUPPORT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.compiles
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_compiled(arch):
    """Every launch of every launcher, compiled for A100, H100 and B100: fits and does not spill."""
    rows = report_rows((arch,))
    assert {row["arch"] for row in rows} == {arch}
    hold(rows)


@pytest.mark.compiles
@pytest.mark.parametrize("arch", [90, 100])
def test_one_launch_of_each_kernel(arch):
    """What an older Triton is asked beside all launches on an A100, whose registers are fewest:
    each kernel goes its way to the tensor cores of the others too, if it has any."""
    first = {}
    for op, found in launches(arch).items():
        for launch in sorted(found, key=lambda launch: "*bf16" not in launch.types):
            first.setdefault(launch.kernel.__name__, (op, launch))
    hold([compiled(op, launch, arch) for op, launch in first.values()])


def hold(rows: list[dict]) -> None:
    """Every kernel is there, fits, and spills no more than is known."""
    assert {row["kernel"] for row in rows} >= launched_kernels()
    for row in rows:
        assert row["shared"] <= row["limit"], row
        assert 0 < row["registers"] <= 255, row
        known = SPILLS.get((row["kernel"], row["arch"]), SPILLS.get(row["kernel"], FEW))
        assert row["spilled"] <= known, row


def launched_kernels() -> set[str]:
    """The kernels that a launcher names: launch(NAME, …"""
    files = (ROOT / "kernels").glob("*.py")
    return {x for file in files for x in re.findall(r"launch\(\s*(\w+), \(", file.read_text())}


@pytest.mark.compiles
def test_compiled_ones():
    """Triton compiles an integer 1 in, as a constant: no kernel may want a tensor there."""
    from tab.kernels import (
        h2o,
        local,
        local_backward,
        moe,
        performer,
        performer_backward,
        sparse,
        sparse_backward,
    )

    x, counts = torch.empty(1, 1, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    q, lse = torch.empty(1, 1, 1, 16, device="meta"), torch.empty(1, 1, 1, device="meta")
    rows, sums = q.expand(1, 1, 128, 16), lse.expand(1, 1, 128)  # too many for the kernel of few
    window = None, None, 1, 1, 1, 1, True, 1.0, 0.0  # after key_mask and slopes
    pattern = [torch.empty(n, dtype=torch.int32, device="meta") for n in ((1, 2), 1) * 2]
    pattern += [None, None, 1, True, 1.0, 0.0]
    w, z = torch.empty(1, 16, device="meta"), torch.empty(1, 1, 1, device="meta")
    calls = [
        (moe.grouped, x, x[None], counts),
        (moe.grouped_outer, x, x, counts),
        (h2o.choose, x[None, None], x[None, None], None, 1, 0, True, 1, 1.0),
    ]
    for x, of_x in ((q, lse), (rows, sums)):
        calls += [
            (local.forward, x, x, x, *window),
            (local_backward.backward, x, x, x, x, x, of_x, *window),
            (sparse.forward, x, x, x, *pattern),
            (sparse_backward.backward, x, x, x, x, x, of_x, *pattern),
        ]
    for kernel, causal in ((0, True), (1, False)):
        options = *(None,) * 4, kernel, causal
        calls += [(performer.forward, q, q, q, w, *options, 0.0)]
        given = q, None, None, q, q, q, w, q, z[..., None].expand_as(q), z, z, lse
        calls += [(performer_backward.backward, *given, *options)]
    found = distinct([launch for call in calls for launch in recorded(*call)])
    assert len(found) == 3 + 4 + 6 + 9  # the few of both, then their tiles, then performer
    for launch in found:
        assert compiled("ones", launch, 90)["registers"] > 0
