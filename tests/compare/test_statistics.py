"""Statistics against scipy's answers, by hand, and by simulation where the truth is known."""

import dataclasses
import io
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from tab.compare.runs import Run
from tab.compare.verdicts import EQUIVALENT, NO_PAIRS, ONE_SEED, UNDECIDED, Verdict, verdicts, words
from tab.statistics import (
    MARGIN,
    bootstrap_interval,
    equivalence_p,
    holm,
    mcnemar_p,
    paired_p,
    resampled_images,
    t_interval,
)
from tab.train.training_run import ANSWERS

A = [0.712, 0.705, 0.721, 0.699, 0.716]
B = [0.704, 0.701, 0.709, 0.697, 0.711]
DIFFERENCES = [a - b for a, b in zip(A, B, strict=True)]


def test_t_interval_and_paired_test_are_scipys():
    found = stats.ttest_1samp(DIFFERENCES, 0).confidence_interval(0.95)
    assert t_interval(DIFFERENCES) == pytest.approx((found.low, found.high), rel=1e-12)
    assert paired_p(DIFFERENCES) == pytest.approx(stats.ttest_rel(A, B).pvalue, rel=1e-12)
    assert t_interval([0.5]) is None and math.isnan(paired_p([0.5]))


def test_seeds_that_do_not_vary_say_nothing():
    """0.1 + 0.2 − 0.3 is not 0: rounding must not pass for a spread."""
    same = [0.1 + 0.2 - 0.3, 0.0, 0.0]
    for values in (same, [0.02, 0.02, 0.02]):
        assert math.isnan(paired_p(values)) and math.isnan(equivalence_p(values, 0.0))


@pytest.mark.parametrize("shift", [0.0, 0.003, -0.004, 0.02])
def test_equivalence_is_the_larger_of_two_one_sided_tests(shift):
    values = shift + np.array([-0.001, 0.0005, 0.0015, -0.0012, 0.0002])
    lower = stats.ttest_1samp(values, -MARGIN, alternative="greater").pvalue
    upper = stats.ttest_1samp(values, MARGIN, alternative="less").pvalue
    assert equivalence_p(values, 0.0) == pytest.approx(max(lower, upper), rel=1e-9)
    assert (equivalence_p(values, 0.0) < 0.05) == (abs(shift) < 0.0035)
    # The images' share widens both; without it, or with two seeds, nothing is said.
    assert equivalence_p(values, 1e-6) > equivalence_p(values, 0.0) or shift == 0.02
    assert paired_p(values, 1e-6) >= paired_p(values)
    assert math.isnan(equivalence_p(values, None)) and math.isnan(equivalence_p(values[:2], 1e-9))


def test_mcnemar_against_the_textbook():
    """One seed: mid-p = p of the exact binomial test − the probability of what was seen."""
    right = np.zeros((1, 100), bool)
    control = right.copy()
    right[0, :12], control[0, 12:17], control[0, 50:], right[0, 50:] = True, True, True, True
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


# --- bootstrap ------------------------------------------------------------------------------------


def study(generator, seeds, skill, difficulty, images=200):
    """Answers of seeds of different skill to images of different difficulty; the truth is 0.5."""
    by_seed = generator.normal(0, skill, (seeds, 1))
    return generator.random((seeds, images)) < 0.5 + by_seed + difficulty * generator.choice(
        [-1, 1], images
    )


CASES = {  # seeds, spread of skill, spread of difficulty
    "few seeds": (3, 0.03, 0.25),
    "seeds alone": (5, 0.03, 0.0),
    "neither": (5, 0.0, 0.0),
    "images above all": (5, 0.005, 0.45),
}


@pytest.mark.parametrize("case", CASES)
def test_the_bootstrap_covers(case, monkeypatch):
    """Of 300 studies with a known truth 95 % hold it, give or take four standard errors."""
    monkeypatch.setattr("tab.statistics.RESAMPLES", 400)
    generator, hits = np.random.default_rng(1), 0
    for i in range(300):
        right = study(generator, *CASES[case])
        low, high = bootstrap_interval(right, resampled_images(right, seed=i), seed=i)
        hits += low <= 0.5 <= high
    assert 270 <= hits <= 298, f"{hits} of 300"


def test_resampled_images_pair_runs():
    right = study(np.random.default_rng(0), 2, 0.0, 0.1, images=300)
    means = resampled_images(np.stack([right[0], right[0], right[1]]))
    assert np.array_equal(means[:, 0], means[:, 1])
    assert means.mean(0) == pytest.approx(right.mean(1)[[0, 0, 1]], abs=0.003)
    # Binomial: a mean over N images drawn with replacement.
    p = right[0].mean()
    assert means[:, 0].std() == pytest.approx(math.sqrt(p * (1 - p) / 300), rel=0.08)
    assert np.array_equal(means, resampled_images(np.stack([right[0], right[0], right[1]])))


# --- verdicts -------------------------------------------------------------------------------------


def run_of(folder, attention, seed, right) -> Run:
    path = folder / f"cnn-{attention}-s{seed}"
    path.mkdir(parents=True, exist_ok=True)
    np.savez(path / ANSWERS, predicted=np.where(right, 1, 0).astype(np.uint8),
             label=np.ones(len(right), np.uint8))  # fmt: skip
    summary = {"final_test_accuracy": float(np.mean(right))}
    return Run("cnn", attention, seed, path, "done", summary=summary)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """2000 images, 5 seeds: better by 6 points; the same but for 2 images; by chance; one seed."""
    folder, generator = tmp_path_factory.mktemp("runs"), np.random.default_rng(3)
    made = []
    for seed in range(5):
        control = generator.random(2000) < 0.6 + 0.01 * seed
        wrong = np.flatnonzero(~control)
        more = generator.choice(wrong, 120 + 3 * seed, replace=False)
        better, near = control.copy(), control.copy()
        better[more] = True
        near[wrong[: seed % 2]] = True
        variants = {"none": control, "self": better, "local": near}
        variants["linear"] = generator.random(2000) < 0.6 + 0.01 * seed
        variants["sparse"] = control  # another name of the control
        if seed == 0:
            variants["flex"] = better
        made += [run_of(folder, name, seed, right) for name, right in variants.items()]
    return made


def test_verdicts_of_constructed_runs(runs):
    found = verdicts(runs, "cnn")
    assert {a: v.verdict for a, v in found.items()} == {
        **{"none": "", "self": "better", "local": EQUIVALENT, "linear": UNDECIDED},
        **{"sparse": EQUIVALENT, "flex": ONE_SEED},
    }
    best = found["self"]
    assert best.interval_over == "seeds and images" and (best.seeds, best.pairs) == (5, 5)
    assert best.difference == pytest.approx(0.063, abs=1e-9)
    assert 0.04 < best.difference_low < 0.063 < best.difference_high < 0.085
    # Paired by image: narrower than the accuracy itself, whose seeds and images vary.
    assert best.difference_high - best.difference_low < best.accuracy_high - best.accuracy_low
    assert best.p < best.p_holm <= 5 * best.p and best.p_mcnemar < 1e-6
    assert found["sparse"].p == 1.0 == found["sparse"].p_mcnemar
    assert found["flex"].difference_low is None and found["flex"].p_mcnemar < 1e-6


def test_runs_that_did_not_keep_their_answers_rest_on_seeds(runs):
    old = [dataclasses.replace(run, path=run.path.parent / "gone" / run.id) for run in runs]
    found = verdicts(old, "cnn")
    assert found["self"].verdict == "better" and found["self"].p_mcnemar is None
    assert found["self"].interval_over == "seeds"
    by_seed = {(r.attention, r.seed): r.accuracy for r in runs}
    differences = [by_seed["self", s] - by_seed["none", s] for s in range(5)]
    assert (found["self"].difference_low, found["self"].difference_high) == t_interval(differences)
    # Equal accuracies are not equal answers, and of how many images is not known.
    assert found["sparse"].verdict == UNDECIDED and found["local"].p_equivalent is None
    # With others that did, it is known of which.
    mixed = verdicts([r for r in runs if r.attention != "self"] + old, "cnn")
    assert mixed["local"].interval_over == "seeds"


def test_without_a_control_there_is_no_verdict(runs):
    assert verdicts([r for r in runs if r.attention == "self"], "cnn")["self"].verdict == NO_PAIRS
    assert verdicts([], "cnn") == {} == verdicts(runs, "mlp")


def test_words():
    both = Verdict("cnn", "self", 5, 5, 0.7, difference=-0.002, p_holm=0.01, p_equivalent=0.01)
    assert words(both) == "worse, by less than 0.5"
    assert words(dataclasses.replace(both, p_equivalent=0.2)) == "worse"
    assert words(dataclasses.replace(both, p_holm=0.2)) == EQUIVALENT
    assert words(dataclasses.replace(both, p_holm=None, p_equivalent=None)) == UNDECIDED


@pytest.mark.parametrize("damage", [b"", b"PK\3\4 and then", "pickled"])
def test_damaged_answers_are_named(damage, tmp_path):
    run = run_of(tmp_path, "none", 0, np.ones(4, bool))
    if damage == "pickled":
        file = io.BytesIO()
        np.savez(file, predicted=np.array([{}], dtype=object), label=np.zeros(1))
        damage = file.getvalue()
    (run.path / ANSWERS).write_bytes(damage)
    with pytest.raises(ValueError, match=r"test.npz is damaged.*remove it"):
        run.right()


def test_equal_answers_to_twenty_images_are_no_equivalence(tmp_path):
    """Two seeds, or three: the control under another name, which nothing tells apart."""
    right = np.arange(20) % 3 > 0
    for seeds in (2, 3):
        pairs = itertools.product(("none", "self"), range(seeds))
        few = [run_of(tmp_path, a, s, right) for a, s in pairs]
        assert verdicts(few, "cnn")["self"].verdict == UNDECIDED
    right = np.arange(10_000) % 3 > 0
    pairs = itertools.product(("none", "self"), range(3))
    many = [run_of(tmp_path, a, s, right) for a, s in pairs]
    assert verdicts(many, "cnn")["self"].verdict == EQUIVALENT
