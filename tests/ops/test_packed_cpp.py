"""Packed batches in C++: one call for all sequences, whose numbers are those of the loop."""

from functools import partial

import pytest
import torch
from backends import needs_cpp
from packs import LENGTHS, H, call, cu, cut, draw, loop, results
from tasks import threads

from tab import gated_linear_attention, local_attention
from tab.ops import OPS, _packed_op

NAMES = "linear", "performer", "local"
T = sum(LENGTHS)
pytestmark = needs_cpp("linear_fwd")


def gated(*x, **options):
    """With a decay that is no leaf."""
    return gated_linear_attention(*x, -x[1].square().mean(-1), return_state=True, **options)


def case(name, **options):
    return (lambda *x: gated(*x, **options)) if name == "gated" else call(name, **options)


def same_bits(name, x, lengths, **options):
    one = case(name, backend="cpp", **options)
    many = case(name, backend="cpp", cu_seqlens=cu(lengths), **options)
    got, want = results(many, x), results(lambda *x: loop(name, one, x, lengths), x)
    assert all(map(torch.equal, got, want)) and len(got) == len(want)


@pytest.mark.parametrize("name", [*NAMES, "gated"])
def test_one_call_for_all_sequences(name, monkeypatch):
    monkeypatch.setattr(_packed_op, "each_group", None)
    x = draw("linear", T)
    assert len(results(case(name, cu_seqlens=cu(LENGTHS)), x)) >= 4
    assert OPS["linear_packed_fwd"].whole and not OPS["channel_gated_linear_packed_fwd"].whole


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [(300, 13), (13, 300)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_few_sequences_on_any_number_of_threads(name, lengths, count):
    """Too few for three threads: each is cut into segments, as it would be by itself."""
    with threads(count):
        same_bits(name, draw("linear", 313), lengths, causal=True)


def test_gated_few_sequences():
    for count in (1, 3):
        with threads(count):
            same_bits("gated", draw("linear", 613), (600, 13))


@pytest.mark.parametrize("lengths", [LENGTHS, (300, 13)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_local_with_every_rule(lengths, count):
    """Positions, masks and heads are those of each sequence."""
    x = draw("local", sum(lengths), heads=2)
    mask = torch.rand(1, sum(lengths), generator=torch.Generator().manual_seed(3)) < 0.7
    rules = {"window": (20, 7), "softcap": 3.0, "alibi": torch.linspace(0.1, 0.5, H)}
    f = partial(local_attention, backend="cpp", return_lse=True, **rules)

    def alone(*x):
        parts = zip(cut("local", x, lengths), mask.split(lengths, 1), strict=True)
        o, lse = zip(*(f(*p, key_mask=m) for p, m in parts if p[0].shape[2]), strict=True)
        return torch.cat(o, 2), torch.cat(lse, 2).detach()

    def packed(*x):
        o, lse = f(*x, key_mask=mask, cu_seqlens=cu(lengths))
        return o, lse.detach()

    with threads(count):
        assert all(map(torch.equal, results(packed, x), results(alone, x)))


@pytest.mark.parametrize("name", NAMES)
def test_one_long_sequence_beside_short_ones(name):
    """Sums over many tokens are compensated, those of the short ones are not."""
    lengths = (2**15 + 65, 70)
    x = [t[:, :1] for t in draw("linear", sum(lengths))]
    with threads(1):
        same_bits(name, x, lengths)


def test_ends_that_point_out_of_the_tensors():
    """Said by the op; and who calls the kernel itself reads no foreign memory."""
    x, ends = [t.detach() for t in draw("linear", 7)], torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="end at 7, the number of tokens; it ends at 9"):
        call("linear", cu_seqlens=ends)(*x)
    kernel = OPS["linear_packed_fwd"].whole
    with pytest.raises(RuntimeError, match="linear_packed_fwd: cu_seqlens does not fit the tokens"):
        kernel(*x, None, None, None, ends, 0, False, 0.0)
