"""Data sets in memory, their splits and their batches."""

from .dataset import Dataset, Split
from .load import load_dataset

__all__ = ["Dataset", "Split", "load_dataset"]
