"""Averages over seeds, and how they are written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..compare.columns import Column
from ..compare.disturbance import disturbed
from ..compare.runs import Run
from ..statistics import t_interval


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and half the width of its 95 % interval (None with one seed)."""

    value: float
    half: float | None = None
    disturbed = False  # as a median can be

    @classmethod
    def of(cls, values: list[float]) -> Mean | None:
        if not values:
            return None
        return cls.between(float(np.mean(values)), *(t_interval(values) or (None, None)))

    @classmethod
    def between(cls, value: float, low: float | None, high: float | None) -> Mean:
        return cls(value, None if low is None else (high - low) / 2)

    def show(self, form: str, scale: float = 1.0, unit: str = "") -> str:
        half = "" if self.half is None else f" ± {self.half * scale:{form.lstrip('+')}}"
        return f"{self.value * scale:{form}}{half}{unit}"

    @property
    def spread(self) -> tuple[float, float]:
        """How far its bar reaches below and above."""
        return (self.half or 0.0,) * 2


@dataclass(frozen=True)
class Median:
    """A median over seeds, for times, with the least and the largest (None with one seed): what
    else the machine did during one run lengthens that run alone."""

    value: float
    low: float | None = None
    high: float | None = None
    disturbed: bool = False  # other work decided it, more than the mechanism

    @classmethod
    def of(cls, values: list[float], disturbed: bool = False) -> Median | None:
        if not values:
            return None
        ends = (min(values), max(values)) if len(values) > 1 else (None, None)
        return cls(float(np.median(values)), *ends, disturbed)

    def show(self, form: str, scale: float = 1.0, unit: str = "") -> str:
        low, high = self.low, self.high
        ends = "" if low is None else f" ({low * scale:{form}}–{high * scale:{form}})"
        return f"{self.value * scale:{form}}{unit}{ends}"

    @property
    def spread(self) -> tuple[float, float]:
        return (0.0, 0.0) if self.low is None else (self.value - self.low, self.high - self.value)


def average(column: Column, runs: list[Run]) -> Mean | Median | None:
    """Of a metric over these runs, as it says itself; None where there is nothing to show."""
    if not column.on_cpu and any(run.device == "cpu" for run in runs):
        return None
    values = [value for run in runs if (value := column.of(run)) is not None]
    if column.over == "any":
        return Mean(values[0]) if values else None
    if column.over == "mean":
        return Mean.of(values)
    return Median.of(values, column.measured and bool(disturbed(runs)))


UNITS = {"seconds": "s", "percent": "%", "bytes": "MiB"}  # of a metric, where it has one


def shown(found: Mean | Median | None, unit: str, *, bare: bool = False) -> str:
    """In a table. bare: without the unit, which the head of the column then names."""
    if found is None:
        return "–"
    said = "" if bare or unit not in UNITS else f" {UNITS[unit]}"
    if unit == "count":
        return count(found.value) + " *" * found.disturbed
    if unit == "seconds":
        return marked(found, ".0f" if found.value >= 10 else ".2f", said)
    if unit == "percent":
        return found.show(".1f", 100, said)
    return found.show(".0f", 2**-20, said) if unit == "bytes" else found.show(".4g")


def marked(found: Mean | Median, form: str, unit: str) -> str:
    """With a star where it was disturbed."""
    return found.show(form, unit=unit) + " *" * found.disturbed


def count(n: float | None) -> str:
    """1234567 -> '1.23 M'"""
    if n is None:
        return "–"
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if n >= limit:
            return f"{n / limit:.3g}{unit}"
    return f"{n:.0f}"
