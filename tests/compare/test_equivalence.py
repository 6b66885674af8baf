"""Tests whose variance is that of seeds and images: what few of either can show, by simulation."""

import math

import numpy as np
import pytest

from tab.statistics import (
    MARGIN,
    bootstrap_interval,
    equivalence_p,
    images_variance,
    least_images,
    paired_p,
)


def test_images_variance_by_hand():
    """Two seeds that differ from the control on the same 4 of 100 images: all of it is the
    images'. Where each seed differs on its own, it is the seeds'."""
    table = np.zeros((2, 100))
    assert images_variance(table) == pytest.approx(2 / 102**2)
    table[:, :4] = 1
    assert images_variance(table) == pytest.approx(0.04 * 0.96 / 99 + 2 / 102**2)
    noise = np.random.default_rng(0).choice([-1, 0, 1], (5, 4000), p=[0.1, 0.8, 0.1])
    assert images_variance(noise) < 0.2 * 0.2 / 4000


@pytest.mark.parametrize(("seeds", "images"), [(2, 10_000), (3, 50), (3, 800), (5, 600)])
def test_too_few_seeds_or_images_never_show_equivalence(seeds, images):
    table = np.zeros((seeds, images))
    p = equivalence_p(table.mean(1), images_variance(table))
    assert math.isnan(p) if seeds < 3 else p > 0.05


def test_no_interval_is_a_point():
    """Equal answers to 50 images leave room for a few points, to 10,000 for hardly any."""
    for images, width in ((50, 0.10), (10_000, 0.0006)):
        low, high = bootstrap_interval(np.zeros((3, images)), np.zeros((2000, 3)))
        assert high - low == pytest.approx(width, rel=0.2) and low < 0 < high


@pytest.mark.parametrize("seeds", [3, 5])
def test_from_the_least_number_on_equal_answers_show_it(seeds):
    at = [least_images(seeds) - 1, least_images(seeds)]
    tables = [np.zeros((seeds, n)) for n in at]
    before, after = (equivalence_p(t.mean(1), images_variance(t)) for t in tables)
    assert before > 0.05 >= after


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("images", [200, 1000, 4000])
def test_equivalence_is_seldom_shown_where_it_is_not(shared, images):
    """Of 400 studies in which the truth differs by the margin at most 5 % say that it does not,
    give or take three standard errors; shared: of what differs, on the same images in each seed."""
    generator, said = np.random.default_rng(2), 0
    more, less = MARGIN + 0.003, 0.003  # of all images: now right, now wrong
    for _ in range(400):
        draw = lambda n: generator.choice([1, -1, 0], n, p=[more, less, 1 - more - less])  # noqa: E731
        one, own = draw(images), draw((3, images))
        table = np.where(generator.random(images) < shared, one, own).astype(float)
        said += equivalence_p(table.mean(1), images_variance(table)) <= 0.05
    assert said <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)


def test_a_chance_of_few_images_is_no_difference():
    """The truth is no difference, but models differ by image: tests over seeds alone call half of
    such studies different, as every seed answers the same 50 images."""
    generator, alone, both = np.random.default_rng(3), 0, 0
    for _ in range(300):
        by_image = generator.choice([1, -1, 0], 50, p=[0.2, 0.2, 0.6])
        table = np.where(generator.random((5, 50)) < 0.9, by_image, 0).astype(float)
        alone += paired_p(table.mean(1)) <= 0.05
        both += paired_p(table.mean(1), images_variance(table)) <= 0.05
    assert alone > 150 and both <= 300 * 0.05 + 3 * math.sqrt(300 * 0.05 * 0.95)
