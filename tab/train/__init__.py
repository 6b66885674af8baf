"""Training one model, or several seeds of it at once."""

from .loop import load_model, train

__all__ = ["load_model", "train"]
