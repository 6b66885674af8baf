"""Errors of verdicts, by simulation of studies whose truth is known: what is equal is not called
different, nor different what is equal, whatever seeds and images happen to be drawn."""

import math

import numpy as np
import pytest
from forks import python
from paths import ROOT
from scipy.special import stdtrit

from tab.compare.verdicts import EQUIVALENT, UNDECIDED, words
from tab.statistics import MARGIN, Family, Sample, above_best, differences, mean


def at_most(share: float, studies: int) -> float:
    """Of so many studies, give or take three standard errors."""
    return studies * share + 3 * math.sqrt(studies * share * (1 - share))


def of(right: np.ndarray, first: int = 0) -> Sample:
    seeds = tuple(range(first, first + len(right)))
    return Sample(seeds, right.mean(1), right.astype(np.float32))


def against(right: np.ndarray, control: np.ndarray):
    return differences([of(right)], of(control))[0]


# --- images ---------------------------------------------------------------------------------------


def test_the_images_part_by_hand():
    """Two seeds that differ from the control on the same 4 of 100 images: all of it is the
    images'. Where each seed differs on its own, it is the seeds'."""
    zeros, right = np.zeros((2, 100)), np.zeros((2, 100))
    least = 2 / 102**2
    assert [p.variance for p in against(zeros, zeros).parts] == pytest.approx([0, least])
    right[:, :4] = 1
    seeds, images = against(right, zeros).parts
    assert seeds.variance == 0 and images.degrees == 99
    assert images.variance == pytest.approx(0.04 * 0.96 / 99 + least)
    drawn = np.random.default_rng(0).random((2, 5, 4000)) < 0.5
    seeds, images = against(*drawn).parts
    assert images.variance < 0.2 * seeds.variance


@pytest.mark.parametrize(("seeds", "images"), [(2, 300), (3, 50), (3, 500), (5, 540)])
def test_too_few_images_never_show_equivalence(seeds, images):
    """All answers alike: from 553 images on another two could not hide half a point."""
    zeros = np.zeros((seeds, images))
    assert words(against(zeros, zeros).interval(), seeds) == UNDECIDED
    zeros = np.zeros((seeds, 560))
    assert words(against(zeros, zeros).interval(), seeds) == EQUIVALENT


def test_no_interval_is_a_point():
    """Equal answers to 50 images leave room for a few points, to 10,000 for hardly any."""
    for images, width in ((50, 0.11), (10_000, 0.0006)):
        low, high = mean(of(np.zeros((3, images)))).interval()
        assert high - low == pytest.approx(width, rel=0.1) and low < 0 < high


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("images", [200, 4000])
def test_equivalence_is_seldom_shown_where_it_is_not(shared, images):
    """The truth differs by the margin; shared: of what differs, on the same images in each seed."""
    generator, said = np.random.default_rng(2), 0
    more, less = MARGIN + 0.003, 0.003  # of all images: now right, now wrong
    for _ in range(400):
        draw = lambda n: generator.choice([1, -1, 0], n, p=[more, less, 1 - more - less])  # noqa: E731
        one, own = draw(images), draw((3, images))
        table = np.where(generator.random(images) < shared, one, own)
        found = against((table > 0).astype(float), (table < 0).astype(float))
        said += words(found.interval(), 3) == EQUIVALENT
    assert said <= at_most(0.05, 400)


def test_a_chance_of_few_images_is_no_difference():
    """The truth is no difference, but models differ by image: a test over seeds alone calls half of
    such studies different, as every seed answers the same 50 images."""
    generator, alone, both = np.random.default_rng(3), 0, 0
    for _ in range(300):
        by_image = generator.choice([1, -1, 0], 50, p=[0.2, 0.2, 0.6])
        table = np.where(generator.random((5, 50)) < 0.9, by_image, 0)
        found = against((table > 0).astype(float), (table < 0).astype(float))
        seeds = found.parts[0]
        alone += abs(found.value) > -stdtrit(4, 0.025) * math.sqrt(seeds.variance)
        both += found.p() <= 0.05
    assert alone > 150 and both <= at_most(0.05, 300)


def study(generator, seeds, skill, difficulty, images=200) -> np.ndarray:
    """Answers of seeds of different skill to images of different difficulty; the truth is 0.5."""
    by_image = difficulty * generator.choice([-1, 1], images)
    by_seed = generator.normal(0, skill, (seeds, 1))
    return (generator.random((seeds, images)) < 0.5 + by_seed + by_image).astype(float)


CASES = {  # seeds, spread of skill, spread of difficulty
    "two seeds": (2, 0.03, 0.25),
    "seeds alone": (5, 0.03, 0.0),
    "neither": (5, 0.0, 0.0),
    "images above all": (5, 0.005, 0.45),
}


@pytest.mark.parametrize("case", CASES)
def test_the_interval_of_an_accuracy_covers(case):
    generator, missed = np.random.default_rng(1), 0
    for _ in range(400):
        low, high = mean(of(study(generator, *CASES[case]))).interval()
        missed += not low <= 0.5 <= high
    assert missed <= at_most(0.05, 400)


# --- families -------------------------------------------------------------------------------------


SPREAD = np.array([1.2, 0.5, 1.0, 0.5, 0.6, 0.3, 0.9, 0.7])  # of the rows' seeds, as they were seen


def rows_of(
    generator, seeds: int, control: int, spreads=SPREAD, of_control=0.7
) -> tuple[list[Sample], Sample]:
    """Of one truth, with seeds that correlate by a half. No answers: the seeds' part alone."""
    order, own = generator.standard_normal(control), math.sqrt(0.5)

    def sample(spread: float, count: int) -> Sample:
        accuracy = own * (order[:count] + generator.standard_normal(count))
        return Sample(tuple(range(count)), spread * accuracy)

    return [sample(spread, seeds) for spread in spreads], sample(of_control, control)


@pytest.mark.parametrize(("seeds", "control"), [(2, 2), (3, 6), (5, 10), (10, 10)])
def test_of_many_equal_rows_none_is_called_different(seeds, control):
    generator, wrong, studies = np.random.default_rng(4), 0, 500
    for _ in range(studies):
        rows, of_control = rows_of(generator, seeds, control)
        alpha = Family.of(rows, of_control).alpha()
        intervals = [found.interval(alpha) for found in differences(rows, of_control)]
        wrong += any(low > 0 or high < 0 for low, high in intervals)
    assert wrong <= at_most(0.05, studies)


@pytest.mark.parametrize(("seeds", "noisy"), [(2, 1), (3, 2), (5, 3), (10, 6)])
def test_rows_may_vary_as_they_like(seeds, noisy):
    """Some of twelve rows vary, the others and the control hardly do: the rows that lend their
    spread have none to lend."""
    generator, wrong, studies = np.random.default_rng(8), 0, 400
    spreads = [1.0] * noisy + [0.02] * (12 - noisy)
    for _ in range(studies):
        rows, control = rows_of(generator, seeds, seeds, spreads, of_control=0.02)
        alpha = Family.of(rows, control).alpha()
        wrong += any(found.p() <= alpha for found in differences(rows, control))
    assert wrong <= at_most(0.06, studies)


def test_the_textbooks_degrees_of_freedom_would_not_do():
    """With two seeds, Satterthwaite's t for the sum of the parts: what agrees by chance passes for
    well known. This is why each part has its own t."""
    generator, wrong, ours = np.random.default_rng(4), 0, 0
    for _ in range(300):
        rows, of_control = rows_of(generator, 2, 4)
        alpha = Family.of(rows, of_control).alpha()
        alone = [differences([row], of_control)[0] for row in rows]
        ours += any(found.p() <= alpha for found in alone)
        for found in alone:
            v = np.array([part.variance for part in found.parts])
            degrees = v.sum() ** 2 / (v**2 / [part.degrees for part in found.parts]).sum()
            if abs(found.value) > -stdtrit(degrees, alpha / 2) * math.sqrt(v.sum()):
                wrong += 1
                break
    assert wrong > 300 * 0.10 and ours <= at_most(0.05, 300)


@pytest.mark.parametrize("behind", [0.0, 3.0])
def test_against_the_best_control_no_row_is_misplaced(behind):
    """The controls are all alike, or all but one `behind`: no row is better than the best, none
    worse, though the best one seen is the one that luck favoured."""
    generator, wrong, studies = np.random.default_rng(6), 0, 400
    for _ in range(studies):
        (*rows, a, b, c), control = rows_of(generator, 5, 5)
        others = [Sample(x.seeds, x.accuracy - behind) for x in (a, b, c)]
        intervals = [above.interval for above in above_best(rows, [control, *others])]
        wrong += any(low > 0 or high < 0 for low, high in intervals)
    assert wrong <= at_most(0.05, studies)


def test_the_control_under_a_second_name_comes_out_equivalent():
    """Seeds that vary by 0.25 points, 10 of the row and 20 of the control, none in common; a row
    that is better by twice the margin does not."""
    generator, images, unsure = np.random.default_rng(7), 10_000, 400
    said = {0.0: [], 2 * MARGIN: []}
    for _ in range(80):
        sure = generator.random(images - unsure) < 0.75

        def models(count, gain, sure=sure):
            skill = 0.5 + (gain + 0.0023 * generator.standard_normal((count, 1))) * images / unsure
            drawn = generator.random((count, unsure)) < skill
            return np.hstack([drawn, np.tile(sure, (count, 1))]).astype(np.float32)

        control = of(models(20, 0.0), first=100)
        for gain, found in said.items():
            (estimate,) = differences([of(models(10, gain))], control)
            found.append(words(estimate.interval(), 10))
    assert said[0.0].count(EQUIVALENT) >= 0.9 * 80
    assert 80 - said[0.0].count(EQUIVALENT) - said[0.0].count(UNDECIDED) <= at_most(0.05, 80)
    assert EQUIVALENT not in said[2 * MARGIN]


def test_the_published_simulation_runs():
    """bench/verdicts.py, whose table stands in docs/statistics.md: a line for each model and
    number of seeds."""
    done = python(ROOT / "bench/verdicts.py", "4", "400")
    assert done.returncode == 0, done.stderr
    lines = [line.split()[:3] for line in done.stdout.splitlines()[2:]]
    table = (ROOT / "bench/results/verdicts.txt").read_text().splitlines()[2:]
    assert lines == [line.split()[:3] for line in table] and len(lines) == 12
    assert (ROOT / "docs/statistics.md").read_text().count("\n".join(table)) == 1
