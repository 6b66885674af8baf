"""What differences between trained models are worth: one variance, and from it test and interval.

Pure functions of numbers. A variant has S seeds; each is a trained model that answers the same N
test images. docs/statistics.md holds the formulas, their sources, what was simulated, and what they
cannot say. `python bench/verdicts.py` simulates them.
"""

from .best import above_best
from .difference import Sample, differences, mean
from .estimate import LEVEL, MARGIN, Estimate, Part, t_interval
from .family import Family
from .single import holm, mcnemar_p

__all__ = [
    "LEVEL",
    "MARGIN",
    "Estimate",
    "Family",
    "Part",
    "Sample",
    "above_best",
    "differences",
    "holm",
    "mcnemar_p",
    "mean",
    "t_interval",
]
