"""TAB, Transformer Attention Bench: which attention, how fast, and does it help?"""

from . import functional
from .functional import *  # noqa: F403
from .ops import use_backend

__version__ = "0.1.0"
__all__ = [*functional.__all__, "functional", "use_backend"]
