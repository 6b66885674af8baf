"""TAB from Python: what the commands of the shell do, as functions that return what they found."""

from .comparison import Comparison, compare
from .search import Sweep, sweep
from .study import load_study
from .timings import Timings, bench

__all__ = ["Comparison", "Sweep", "Timings", "bench", "compare", "load_study", "sweep"]
