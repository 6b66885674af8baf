"""Time against N: who goes on, who drops out, and what the machine can do at most."""

import pytest
import torch
from backends import needs_cpp

from tab.bench import growth
from tab.bench.cases import Case
from tab.bench.measure import measure
from tab.bench.roofline import COPY, MULTIPLY_ADDS, READ, Roofline, measure_roofline
from tab.bench.rows import Row
from tab.cli.bench_tables import growth_table

ROOF = Roofline(flops=1e11, bandwidth=1e10)
FORWARD = growth.milliseconds("forward")


def row(n, seconds, name="rival", **known):
    times = {"forward": [seconds], "both": [3 * seconds]}
    return Row(f"local/n{n}/full/float32", name, seconds=times, **known)


def test_a_rival_drops_out_and_says_why_and_tab_stays(monkeypatch):
    asked = []

    def fresh(measure, case):
        late, n = measure.keywords["late"], case.shape[2]
        asked.append((n, set(late)))
        took = {"tab": 40.0, "slow": n / 64, "gone": None}
        return [
            row(n, took[name], name) if took[name] else Row(case.name, name, skipped="no GPU")
            for name in took
            if name not in late
        ]

    monkeypatch.setattr(growth, "fresh", fresh)
    rows = [r for some in growth.curves("local", (64, 256, 1024), ROOF, 50.0, 1.0) for r in some]
    # slow takes 3 s forward and backward at N 64, 12 s at 256, and 192 s at 1024 if it grows as N²
    assert asked == [(64, set()), (256, {"gone"}), (1024, {"gone", "slow"})]
    assert [r.skipped for r in rows if r.contestant == "slow"][
        2
    ] == "could take 192 s a call, 50 may"
    assert len(rows) == 9 and not any(r.skipped for r in rows if r.contestant == "tab")
    assert growth_table(rows, "ms", FORWARD).row_count == 3


def test_growth_leaves_small_n_to_fixed_costs():
    rows = [row(n, max(n, 1024) * 1e-6) for n in (64, 256, 1024, 4096, 16384)]
    assert growth.exponent(rows, FORWARD) == pytest.approx(1)


def test_a_point_is_measured(tmp_path):
    """In this process, whose memory is therefore not limited."""
    some = {"tab", "tab reference", "eager"}.__contains__
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(growth, "_limit_memory", lambda: None)
        patched.setattr(growth, "fresh", lambda measure, case: measure(case))
        (rows,) = growth.curves("linear", (64,), ROOF, 5.0, 0.01, some)
    names = {r.contestant for r in rows if r.seconds}
    assert {"tab", "eager"} <= names and not any(name.startswith("tab ") for name in names)
    assert all(r.error < 1e-4 for r in rows if r.seconds)
    growth.picture([*rows, *(row(n, 0.1) for n in (64, 256))], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


# --- ceilings -------------------------------------------------------------------------------------


@needs_cpp("linear_fwd")
def test_the_loops_do_the_work_that_they_report():
    x = torch.zeros(256 * torch.get_num_threads())
    assert torch.ops.tab.peak(x, READ, 3) == 3 * x.nbytes
    assert torch.ops.tab.peak(x, MULTIPLY_ADDS, 5) % (2 * 12 * 5 * torch.get_num_threads()) == 0
    with pytest.raises(RuntimeError, match="what is 0, 1 or 2"):
        torch.ops.tab.peak(x, 3, 1)


@needs_cpp("linear_fwd")
def test_a_copy_is_one(one_thread):
    x = torch.arange(256.0)
    assert torch.ops.tab.peak(x, COPY, 1) == x.nbytes
    assert torch.equal(x[128:], torch.arange(128.0))


@needs_cpp("linear_fwd")
def test_reading_reads_all(one_thread):
    x = torch.ones(256)
    torch.ops.tab.peak(x, READ, 1)
    assert x[0] == 1 + 256


def test_the_ceiling_says_what_it_is_of(monkeypatch):
    found = measure_roofline(torch.float32, "cpu", rounds=1)
    assert found.flops > 0 and found.bandwidth > 0 and found.by in found.to_dict().values()


def test_exponentials_are_part_of_the_floor_and_of_no_rate():
    slow = Roofline(flops=1e6, bandwidth=1e12)
    case = Case("performer", "tiny")
    (row,) = measure(case, slow, directions=("forward",), budget=0.01, only="tab".__eq__)
    exponentials = 2 * 2 * 2 * 65 * 256  # of q and k; B 2, H 2, N 65, M 256
    assert row.floor["forward"] == (row.flops["forward"] + 24 * exponentials) / 1e6
    assert row.floor["backward"] == row.flops["backward"] / 1e6
