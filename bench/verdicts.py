"""How often verdicts are wrong, and find half a point: python bench/verdicts.py [STUDIES] [IMAGES]

Draws studies (2,000 by default) whose truth is known: eleven rows and a control answer the same
test images (10,000), with the seed variances, the correlation over seeds and the images' share of
results/examples/fair. Each goes through the functions that make a report's verdicts. Printed in per
cent of studies, for so many seeds of a row and of the control:

    wrong       any of eleven equal rows is called different (at most 5)
    all hold    the intervals of all rows hold the truth, whatever it is (at least 95)
    accuracy    intervals of single rows' accuracies hold it (at least 95)
    best wrong  any of eight rows is placed wrongly against the best of four controls (at most 5);
                of every fourth study, as are the last two
    A/A         of the control under a second name, with seeds of its own, it is said: equivalent,
                undecided, different (at most 5)
    +0.5        a row that is half a point better is found so; ±: half the width of its interval
    one t       wrong, had each row its own variance, with Satterthwaite's degrees of freedom
    one s²      wrong, had all rows the same variance between seeds, their mean
"""

from __future__ import annotations

import csv
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from tab.compare.verdicts import BETTER, EQUIVALENT, UNDECIDED, WORSE, words
from tab.statistics import Estimate, Family, Part, Sample, above_best, differences, mean

FAIR = Path(__file__).parents[1] / "results/examples/fair/experiment_summary.csv"
DESIGNS = [(2, 2), (3, 3), (5, 5), (5, 10), (10, 10), (10, 20)]  # seeds of a row, control
EFFECT = 0.005
CONTROLS = 4  # the control, and the first rows, for the verdicts against the best of them
SELDOM = 4  # of so many studies one goes through what takes long
UNSURE = 0.15  # of the images, which a seed answers by chance
FLIPPED = {"CNN": 0.0125, "MLP": 0.004}  # which a variant answers unlike others, in every seed
RIGHT = 0.45  # of the other images


class World:
    """Studies of rows whose true accuracies are all the same.

    The seed SDs are those seen, and so is the mean correlation of rows with the control over seeds.
    FLIPPED gives the images' part of the variance that the bootstrap of that study came to: about
    0.15 points of SD in a CNN's difference, 0.08 in an MLP's.
    """

    def __init__(self, model: str, images: int):
        accuracy: dict[str, list[float]] = defaultdict(list)
        with FAIR.open(newline="") as file:
            for line in csv.DictReader(file):
                if line["architecture"] == model:
                    accuracy[line["attention_type"]].append(float(line["final_test_accuracy"]))
        table = np.array([accuracy.pop("Control"), *accuracy.values()])  # (1 + k, S)
        covariance = np.cov(table)
        self.sd = np.sqrt(np.diag(covariance))
        self.shared = covariance[0, 1:].sum() / (self.sd[0] * self.sd[1:]).sum()
        self.images, self.flipped, self.rows = images, FLIPPED[model], len(accuracy)
        sure = RIGHT * (1 - self.flipped) + (1 - RIGHT) * self.flipped
        self.truth = (1 - UNSURE) * sure + UNSURE / 2

    def study(self, generator, row_seeds: int, control_seeds: int) -> tuple[list[Sample], Sample]:
        """The rows, last of them the control under a second name with seeds of its own; and the
        control."""
        by_order = generator.standard_normal(control_seeds)
        unsure = generator.binomial(self.images, UNSURE)
        base = generator.random(self.images - unsure) < RIGHT

        def sample(i: int, count: int, order: np.ndarray | None, sure: np.ndarray) -> Sample:
            own = generator.standard_normal(count)
            mixed = own
            if order is not None:
                mixed = np.sqrt(self.shared) * order + np.sqrt(1 - self.shared) * own
            by_chance = UNSURE / 4 / self.images  # of the variance between seeds
            skill = np.sqrt(max(0.0, self.sd[i] ** 2 - by_chance)) * mixed
            right = np.empty((count, self.images), np.float32)
            right[:, unsure:] = sure
            drawn = generator.random((count, unsure), dtype=np.float32)
            right[:, :unsure] = drawn < 0.5 + skill[:, None] / UNSURE
            first = 0 if order is not None else 1000
            return Sample(tuple(range(first, first + count)), right.mean(1, np.float64), right)

        def flipped() -> np.ndarray:
            return base ^ (generator.random(len(base)) < self.flipped)

        of_control = flipped()
        control = sample(0, control_seeds, by_order, of_control)
        order = by_order[:row_seeds]
        rows = [sample(i, row_seeds, order, flipped()) for i in range(1, self.rows + 1)]
        return [*rows, sample(0, row_seeds, None, of_control)], control


def one_t(estimate: Estimate, alpha: float) -> float:
    """Half the width by Satterthwaite (1946): one t for the sum of the parts."""
    total = sum(part.variance for part in estimate.parts)
    degrees = total**2 / sum(part.variance**2 / part.degrees for part in estimate.parts)
    return -stdtrit(degrees, alpha / 2) * total**0.5


def one_variance(alone: list[Estimate]) -> list[Estimate]:
    """Dunnett's own: the first part, that of paired seeds, is the mean of all rows'."""
    first = [estimate.parts[0] for estimate in alone]
    degrees = sum(part.degrees for part in first)
    pooled = Part(float(np.mean([part.variance for part in first])), degrees)
    return [Estimate(e.value, (pooled, *e.parts[1:])) for e in alone]


def simulate(world: World, design: tuple[int, int], studies: int) -> Counter:
    """Sums over studies, each of a share."""
    found: Counter = Counter()
    for number in range(studies):
        generator = np.random.default_rng((*design, number))
        rows, control = world.study(generator, *design)
        *rows, again = rows
        alpha, estimates = Family.of(rows, control).alpha(), differences(rows, control)
        intervals = [estimate.interval(alpha) for estimate in estimates]
        found["wrong"] += any(low > 0 or high < 0 for low, high in intervals)
        said = words(differences([again], control)[0].interval(), min(design))
        found[said.split(",")[0]] += 1
        found["better by 0.5"] += np.mean([low + EFFECT > 0 for low, _ in intervals])
        found["half"] += np.median([high - low for low, high in intervals]) / 2
        ends = [mean(row).interval() for row in rows]
        found["accuracy"] += np.mean([low <= world.truth <= high for low, high in ends])
        if number % SELDOM == 0:
            controls, others = [control, *rows[: CONTROLS - 1]], rows[CONTROLS - 1 :]
            above = [each.interval for each in above_best(others, controls)]
            found["best wrong"] += SELDOM * any(low > 0 or high < 0 for low, high in above)
            alone = [differences([row], control)[0] for row in rows]
            found["one t"] += SELDOM * any(abs(e.value) > one_t(e, alpha) for e in alone)
            found["one s²"] += SELDOM * any(
                abs(e.value) > e.half(alpha) for e in one_variance(alone)
            )
    return found


def main() -> None:
    studies, images = (int(x) for x in [*sys.argv[1:3], *("2000", "10000")[len(sys.argv) - 1 :]])
    print(f"{studies:,} studies of 11 rows and a control, {images:,} test images")
    print(
        "of     seeds control  wrong  all hold  accuracy  best wrong                A/A"
        "   +0.5  ± points  one t  one s²"
    )
    for model in ("CNN", "MLP"):
        world = World(model, images)
        for design in DESIGNS:
            share = {k: 100 * v / studies for k, v in simulate(world, design, studies).items()}
            again = (share.get(EQUIVALENT, 0), share.get(UNDECIDED, 0))
            again += (share.get(BETTER, 0) + share.get(WORSE, 0),)
            print(
                f"{model:5s} {design[0]:6d} {design[1]:7d} {share['wrong']:6.1f} "
                f"{100 - share['wrong']:9.1f} {share['accuracy']:9.1f} {share['best wrong']:11.1f} "
                f"{' / '.join(f'{x:.1f}' for x in again):>18s} {share['better by 0.5']:6.1f} "
                f"{share['half']:9.2f} {share['one t']:6.1f} {share['one s²']:7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
