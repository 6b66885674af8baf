"""Telling other programs of runs while they train: TensorBoard, W&B, MLflow, or your own."""

from .group import Watchers, check, names
from .watcher import RunWatcher, WatchedRun, metrics, numbers

__all__ = ["RunWatcher", "WatchedRun", "Watchers", "check", "metrics", "names", "numbers"]
