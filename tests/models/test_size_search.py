"""The search for a size: the neighbours around the target, found in few trials."""

import itertools

import pytest

from tab.recipe.size_matching import _around

GROWTH = {
    "square": lambda n: 3 * n * n + 70 * n + 900,
    "line": lambda n: 5 * n + 10_000,
    "steps": lambda n: 64 * (n // 16) ** 2 + 8 * n,
    "constant, then steep": lambda n: 1000 + max(0, n - 300) ** 3,
}
VALID = {"any": int, "multiples": lambda n: -(-n // 12) * 12}


def scanned(target, size, valid):
    """By definition."""
    return next(n for n in itertools.count(1) if size(valid(n + 1)) >= target)


@pytest.mark.parametrize("valid", VALID)
@pytest.mark.parametrize("growth", GROWTH)
def test_the_neighbours_are_those_of_a_scan(growth, valid):
    size, fits = GROWTH[growth], VALID[valid]
    for target, near in itertools.product((1, size(7), size(400) + 1, size(1500)), (1, 64, 900)):
        low, high = _around(target, size, near, fits)
        n = scanned(target, size, fits)
        assert high == low + 1 and (fits(low), fits(high)) == (fits(n), fits(n + 1)), (target, near)


@pytest.mark.parametrize("valid", VALID)
def test_it_takes_few_trials(valid):
    """Doubling and halving would take nineteen. A trial builds a model and runs it on one image."""
    asked = set()

    def size(n):
        asked.add(n)
        return GROWTH["square"](n)

    _around(GROWTH["square"](713), size, 512, VALID[valid])
    assert len(asked) <= 7
