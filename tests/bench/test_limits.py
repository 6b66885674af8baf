"""A backend named in the benchmark runs or says why not; no other is timed under its name."""

import pytest

from tab.bench.cases import Case
from tab.bench.measure import measure
from tab.bench.roofline import Roofline
from tab.ops import OPS

ROOF = Roofline(flops=1e11, bandwidth=1e10)


@pytest.mark.skipif(OPS["linear_fwd"].why_not("cpp") is not None, reason="cpp is not built")
def test_what_a_kernel_does_not_take_gets_its_reason_and_no_time(monkeypatch):
    monkeypatch.setitem(OPS["linear_fwd"].takes, "cpp", lambda *x: "only odd head dimensions")
    only = {"tab reference", "tab cpp"}.__contains__
    once = {"budget": 0.0, "min_rounds": 1, "max_rounds": 1}
    rows = {r.contestant: r for r in measure(Case("linear", "tiny"), ROOF, only=only, **once)}
    row = rows["tab cpp"]
    assert row.skipped == "not taken: only odd head dimensions"
    assert not row.seconds and row.peak_bytes is None
    assert rows["tab reference"].seconds["forward"]
