"""Triton kernels and launchers, one op a file. Imported as `tab.kernels`.

Where a clone of TAB is on sys.path, the bare name `kernels` finds this file, while others look for
a package of another project: transformers does so when it is imported. Under that name this one
stands aside.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

if __name__ != "tab.kernels":
    _clone = Path(__file__).resolve().parents[1]
    _others = [place for place in sys.path if Path(place or ".").resolve() != _clone]
    _spec = PathFinder.find_spec(__name__, _others)
    if _spec and _spec.loader:
        sys.modules[__name__] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[__name__])
    else:
        __file__ = None  # as of a folder without this file, which nobody takes for a package
