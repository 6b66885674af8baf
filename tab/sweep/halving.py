"""Successive halving as arithmetic: how many configurations at which budget, and who goes on, and
who wins.

Jamieson & Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization",
figure 3; brackets: Li et al. 2018, "Hyperband", algorithm 1. Nothing here reads, writes or draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..checks import check_keys


@dataclass(frozen=True)
class Budget:
    """What a sweep may spend on each (model, attention)."""

    configurations: int  # n, drawn at first
    epochs: tuple[int, ...]  # of each rung, counted from a configuration's first epoch
    eta: float  # η: of the configurations of a rung, 1/η go on
    images: int  # training images, stratified; 0: all
    validation: int  # images held out of the training set, stratified; all are scored

    def __post_init__(self):
        if self.configurations < 1:
            raise ValueError(f"configurations = {self.configurations}: give at least 1")
        rising = all(a < b for a, b in zip(self.epochs, self.epochs[1:], strict=False))
        if not self.epochs or self.epochs[0] < 1 or not rising:
            text = ",".join(map(str, self.epochs))
            raise ValueError(f"epochs = {text!r}: give one rising number a rung, such as 3,5,7")
        if not (math.isfinite(self.eta) and self.eta > 1):
            raise ValueError(f"eta = {self.eta}: 1/η of a rung go on, so give a number above 1")
        if self.images < 0:
            raise ValueError(f"images = {self.images}: give a number, or 0 for all")
        if self.validation < 1:
            raise ValueError(f"validation = {self.validation}: choices need images held out")


BUDGETS = {
    "quick": Budget(6, (1, 2, 4), 2.0, 2000, 500),
    "published": Budget(20, (3, 5, 7), 2.0, 5000, 1000),
    "medium": Budget(27, (3, 9, 27), 3.0, 20000, 5000),
    "large": Budget(81, (3, 9, 27, 81), 3.0, 0, 5000),
}
OLD_NAMES = {"seed": "published"}  # of a budget, as of a space: version 0.1 said so


def named_budget(name: str) -> Budget:
    """The budget called so; a ValueError names the nearest."""
    name = OLD_NAMES.get(name, name)
    check_keys("budget", [name], BUDGETS)
    return BUDGETS[name]


@dataclass(frozen=True)
class Bracket:
    """One successive halving: `configurations` start at the rung `first`, 0 being the cheapest."""

    number: int
    configurations: int
    first: int

    def sizes(self, budget: Budget, drawn: int) -> list[int]:
        """Configurations in each rung from `first` on, of `drawn` in its first: ⌊drawn/η^i⌋ ≥ 1."""
        rungs = len(budget.epochs) - self.first
        return [max(1, math.floor(drawn / budget.eta**i + 1e-9)) for i in range(rungs)]


def brackets(budget: Budget, count: int = 1) -> list[Bracket]:
    """The first `count` brackets of Hyperband; one is plain successive halving.

    The next bracket leaves out the cheapest rung of the one before, and starts with fewer
    configurations, so that each spends about the same:
    n_s = ⌈n · (s_max + 1)/(s + 1) · η^(s − s_max)⌉, s = s_max, s_max − 1, …
    """
    most = len(budget.epochs)
    if not 1 <= count <= most:
        raise ValueError(f"brackets = {count}: with {most} rungs there are 1 to {most}")
    found = []
    for first in range(count):
        share = most / (most - first) * budget.eta**-first
        found.append(Bracket(first, math.ceil(budget.configurations * share - 1e-9), first))
    return found


def winner(scores: Mapping[tuple[int, int], float | None]) -> tuple[int, int] | None:
    """(configuration, rung) -> score: of the highest rung that was scored the best, of equal ones
    the lower number; None if nothing was scored."""
    scored = {key: score for key, score in scores.items() if score is not None}
    return max(scored, key=lambda key: (key[1], scored[key], -key[0]), default=None)


def promote(scores: Mapping[int, float | None], size: int) -> list[int]:
    """The numbers of the `size` highest scores, best first; of equal ones the lower number.

    None (diverged, failed) never goes on, be there places left or not.
    """
    scored = {number: score for number, score in scores.items() if score is not None}
    return sorted(scored, key=lambda number: (-scored[number], number))[:size]
