"""Rungs, brackets and promotions as numbers."""

import dataclasses

import pytest

from tab.sweep.halving import BUDGETS, Bracket, Budget, brackets, named_budget, promote, winner

PUBLISHED = BUDGETS["published"]


def test_the_published_budget():
    assert Budget(20, (3, 5, 7), 2.0, 5000, 1000) == PUBLISHED
    assert brackets(PUBLISHED) == [Bracket(0, 20, 0)]
    assert brackets(PUBLISHED)[0].sizes(PUBLISHED, 20) == [20, 10, 5]


def test_hyperband_brackets_are_those_of_the_paper():
    """Li et al. 2018, table 1: R = 81, η = 3; n_s by their formula, from the cheapest rung on."""
    budget = dataclasses.replace(PUBLISHED, configurations=81, epochs=(1, 3, 9, 27, 81), eta=3)
    found = brackets(budget, 5)
    assert [b.configurations for b in found] == [81, 34, 15, 8, 5]
    assert [b.first for b in found] == [0, 1, 2, 3, 4]
    assert found[0].sizes(budget, 81) == [81, 27, 9, 3, 1]
    assert found[1].sizes(budget, 34) == [34, 11, 3, 1]
    assert found[4].sizes(budget, 5) == [5]


def test_a_rung_never_becomes_empty_and_follows_what_was_drawn():
    assert Bracket(0, 20, 0).sizes(PUBLISHED, 6) == [6, 3, 1]
    assert Bracket(0, 20, 0).sizes(PUBLISHED, 1) == [1, 1, 1]
    # 3 · 1.1^-1 · 1.1 must not be floored from 2.9999…
    assert Bracket(0, 9, 0).sizes(dataclasses.replace(PUBLISHED, eta=1.5), 9) == [9, 6, 4]


def test_promotion_takes_the_best_and_of_equals_the_lower_number():
    assert promote({0: 0.1, 1: 0.3, 2: 0.3, 3: 0.2}, 2) == [1, 2]
    assert promote({3: 0.5, 2: 0.5, 1: 0.5, 0: 0.1}, 2) == [1, 2]
    assert promote({0: None, 1: 0.0, 2: None}, 2) == [1]
    assert promote({0: None}, 1) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"configurations": 0}, "at least 1"),
        ({"epochs": ()}, "rising"),
        ({"epochs": (3, 3)}, "rising"),
        ({"epochs": (0, 2)}, "rising"),
        ({"eta": 1.0}, "above 1"),
        ({"eta": float("nan")}, "above 1"),
        ({"images": -1}, "0 for all"),
        ({"validation": 0}, "held out"),
    ],
)
def test_budgets_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PUBLISHED, **changes)


def test_as_many_brackets_as_rungs_at_most():
    with pytest.raises(ValueError, match="1 to 3"):
        brackets(PUBLISHED, 4)


def test_a_budget_is_found_by_its_old_name_too():
    assert named_budget("seed") == named_budget("published") == PUBLISHED
    with pytest.raises(ValueError, match="did you mean 'published'"):
        named_budget("publised")


def test_the_winner_is_the_best_of_the_highest_rung_that_was_scored():
    scores = {(0, 0): 0.9, (1, 0): 0.5, (1, 1): 0.4, (2, 1): 0.6, (3, 1): 0.6, (3, 2): None}
    assert winner(scores) == (2, 1)  # of equal ones the lower number
    assert winner({(0, 0): None}) is None and winner({}) is None
