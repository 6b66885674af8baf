"""Statistics against scipy, tables, by hand, and by simulation where the truth is known."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from tab.statistics import (
    LEVEL,
    Estimate,
    Family,
    Part,
    Sample,
    above_best,
    differences,
    holm,
    mcnemar_p,
    t_interval,
)

A = [0.712, 0.705, 0.721, 0.699, 0.716]
B = [0.704, 0.701, 0.709, 0.697, 0.711]
DIFFERENCES = [a - b for a, b in zip(A, B, strict=True)]


def of(accuracy, first: int = 0, right=None) -> Sample:
    return Sample(tuple(range(first, first + len(accuracy))), np.array(accuracy), right)


# --- one difference -------------------------------------------------------------------------------


def test_of_seeds_alone_test_and_interval_are_scipys():
    one = stats.ttest_1samp(DIFFERENCES, 0)
    ends = one.confidence_interval(0.95)
    assert t_interval(DIFFERENCES) == pytest.approx((ends.low, ends.high), rel=1e-12)
    (found,) = differences([of(A)], of(B))
    assert found.interval() == pytest.approx((ends.low, ends.high), rel=1e-12)
    assert found.p() == pytest.approx(stats.ttest_rel(A, B).pvalue, rel=1e-9)
    assert t_interval([0.5]) is None
    (single,) = differences([of([0.6])], of([0.5]))
    assert single.value == pytest.approx(0.1) and single.interval() is None
    assert math.isnan(single.p())


def test_seeds_that_do_not_vary_say_nothing():
    """0.1 + 0.2 − 0.3 is not 0: rounding must not pass for a spread."""
    for values in ([0.1 + 0.2 - 0.3, 0.0, 0.0], [0.02, 0.02, 0.02]):
        (found,) = differences([of(values)], of([0.0, 0.0, 0.0]))
        assert found.interval() is None and math.isnan(found.p())


def test_seeds_that_do_not_pair():
    """Welch's variance, each of its parts with its own degrees of freedom."""
    (found,) = differences([of(A)], of(B[:3], first=10))
    assert found.value == pytest.approx(np.mean(A) - np.mean(B[:3]))
    assert found.parts == (
        Part(pytest.approx(np.var(A, ddof=1) / 5), 4),
        Part(pytest.approx(np.var(B[:3], ddof=1) / 3), 2),
    )


def test_p_is_where_the_interval_ends_at_zero():
    found = Estimate(0.01, (Part(4e-6, 2), Part(9e-6, 9999)))
    by_hand = stats.t.ppf(0.975, 2) ** 2 * 4e-6 + stats.t.ppf(0.975, 9999) ** 2 * 9e-6
    assert found.half(0.05) == pytest.approx(math.sqrt(by_hand))
    assert found.interval(found.p()) == pytest.approx((0, 0.02), abs=1e-9)
    assert found.p(0.002) > found.p(0.004) > found.p(0.04) > 0 and found.p(-0.1) == 1.0


@pytest.mark.parametrize("paired", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("seeds", [(4, 4, 0), (4, 8, 0), (6, 4, 2), (3, 3, 10)])
def test_the_variance_is_that_of_the_difference(paired, seeds):
    """Over 800 studies the mean of the estimated variance is the mean squared error, whatever the
    seeds' correlation, and what varies with seed and image at once is counted once."""
    (rows, controls, first), generator = seeds, np.random.default_rng(5)
    images, errors, variances = 60, [], []
    for _ in range(800):
        order = generator.standard_normal(20)
        difficulty = generator.normal(0, 0.3, images)

        def sample(begin, count, unlike, order=order, difficulty=difficulty):
            """Any table will do: nothing here needs answers to be 0 or 1."""
            mixed = paired**0.5 * order[begin : begin + count]
            mixed = mixed + (1 - paired) ** 0.5 * generator.standard_normal(count)
            own = generator.normal(0, unlike, images)
            right = 0.5 + 0.05 * mixed[:, None] + difficulty + own
            right = right + generator.normal(0, 0.4, (count, images))
            return of(right.mean(1), begin, right)

        (found,) = differences([sample(0, rows, 0.3)], sample(first, controls, 0.2))
        errors.append(found.value**2)
        variances.append(sum(part.variance for part in found.parts) - 2 / (images + 2) ** 2)
    assert np.mean(variances) == pytest.approx(np.mean(errors), rel=0.15)


def test_more_seeds_of_the_control_narrow_the_interval():
    generator = np.random.default_rng(0)
    few, many = [], []
    for _ in range(200):
        control, row = generator.standard_normal(20), generator.standard_normal(5)
        for seeds, into in ((5, few), (20, many)):
            (found,) = differences([of(row)], of(control[:seeds]))
            into.append(found.half(0.05))
    assert np.median(many) < 0.9 * np.median(few)


# --- rows together --------------------------------------------------------------------------------


def test_rows_lend_each_other_their_spread():
    control = [0.0, 0.0, 0.0]
    found = differences([of([0, 1, 2]), of([0, 2, 4]), of([0, 0, 0])], of(control))
    pooled = (1 + 4 + 0) / 3
    expected = [(2 * own + pooled) / 3 / 3 for own in (1, 4, 0)]
    assert [f.parts[0].variance for f in found] == pytest.approx(expected)
    assert {f.parts[0].degrees for f in found} == {2 * 3 * 2 / 4}
    # A row that is not typical neither lends nor borrows.
    wild = dataclasses.replace(of([0, 20, 40]), typical=False)
    found = differences([of([0, 1, 2]), wild], of(control))
    assert [f.parts[0].variance for f in found] == pytest.approx([1 / 3, 400 / 3])
    assert [f.parts[0].degrees for f in found] == [2, 2]


@pytest.mark.parametrize(("k", "critical"), [(2, 2.21), (3, 2.35), (5, 2.51), (9, 2.69)])
def test_dunnetts_table(k, critical):
    """Dunnett (1964), two-sided, 5 %, infinite degrees of freedom, equal numbers."""
    alpha = Family((math.sqrt(0.5),) * k).alpha()
    assert stats.norm.isf(alpha / 2) == pytest.approx(critical, abs=0.006)


def test_dunnetts_probability_is_that_of_the_normal():
    shared = np.array([0.3, 0.5, 0.8])
    correlation = np.outer(shared, shared)
    np.fill_diagonal(correlation, 1)
    normal = stats.multivariate_normal(cov=correlation, seed=0)
    for p in (0.2, 0.05, 0.01):
        c = stats.norm.isf(p / 2)
        inside = normal.cdf([c] * 3, lower_limit=[-c] * 3)
        assert Family(tuple(shared)).adjusted(p) == pytest.approx(1 - inside, abs=2e-4)


def test_a_family_of_one_needs_no_correction():
    one = Family.of([of(A)], of(B))
    assert one.alpha() == pytest.approx(1 - LEVEL) and one.adjusted(0.03) == 0.03
    assert math.isnan(Family((0.5, 0.5)).adjusted(math.nan))
    # What has one seed is not tested, and makes nobody else's interval wider.
    assert Family.of([of(A), of([0.5])], of(B)) == one


def test_adjusted_lies_between_one_and_all_and_grows():
    family, ps = Family((0.5,) * 20), np.geomspace(1e-25, 1, 60)
    adjusted = [family.adjusted(p) for p in ps]
    assert all(p <= a <= min(1, 20 * p) + 1e-15 for p, a in zip(ps, adjusted, strict=True))
    assert adjusted == sorted(adjusted)
    assert family.adjusted(family.alpha()) == pytest.approx(0.05, abs=1e-9)


# --- others ---------------------------------------------------------------------------------------


def test_above_the_best_is_above_each_and_below_it_is_paid_for():
    rows, controls = [of(A), of(B)], [of(np.array(B) - 0.01), of(np.array(A) - 0.03)]
    for i, above in enumerate(above_best(rows, controls)):
        each = [differences(rows, control)[i] for control in controls]
        values = [e.value for e in each]
        alpha, strict = (
            [Family.of(rows, c).alpha(error) for c in controls] for error in (0.05, 0.025)
        )
        assert above.value == min(values) and above.control == int(np.argmin(values))
        lows = [e.interval(a)[0] for e, a in zip(each, alpha, strict=True)]
        highs = [e.interval(a)[1] for e, a in zip(each, strict, strict=True)]
        assert above.interval == pytest.approx((min(lows), min(highs)))


def test_mcnemar_against_the_textbook():
    """One seed: mid-p = p of the exact binomial test − the probability of what was seen."""
    right = np.zeros((1, 100), np.float32)
    control = right.copy()
    right[0, :12], control[0, 12:17], control[0, 50:], right[0, 50:] = 1, 1, 1, 1
    exact = stats.binomtest(5, 17, 0.5).pvalue
    assert mcnemar_p(right, control) == pytest.approx(exact - stats.binom.pmf(5, 17, 0.5))
    assert mcnemar_p(right, right) == 1.0
    assert mcnemar_p(right[:, :12], control[:, :12]) == pytest.approx(2**-12)  # 12 to none
    # The same answers five times are no more images: pooling by image does not count them again.
    five = [np.repeat(table, 5, 0) for table in (right, control)]
    assert mcnemar_p(*five) == mcnemar_p(right, control)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
    found = holm([0.02, math.nan, 0.03])
    assert found[::2] == pytest.approx([0.04, 0.04]) and math.isnan(found[1])
