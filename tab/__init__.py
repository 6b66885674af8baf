"""TAB, Transformer Attention Bench: which attention, how fast, and does it help?

The operators come with torch, which takes a second to import, so they load at first use
(PEP 562): `tab --help` does not wait for them. What there is stands in `tab.functional.__all__` and
below.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"
_PACKAGES = ("functional", "layers", "ops")
# name -> where it lies, apart from the operators: these do not need what trains.
_ELSEWHERE = {"load_model": "train", "swap_attention": "swap"}

if TYPE_CHECKING:  # for type checkers and editors, which run nothing
    from . import functional as functional
    from . import layers as layers
    from . import ops as ops
    from .functional import *  # noqa: F403
    from .ops import use_backend as use_backend
    from .swap import swap_attention as swap_attention
    from .train import load_model as load_model
else:

    def __getattr__(name: str):
        if name in _PACKAGES:
            return importlib.import_module(f"{__name__}.{name}")
        if name in _ELSEWHERE:
            return getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE[name]}"), name)
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        functional, ops = (importlib.import_module(f"{__name__}.{x}") for x in _PACKAGES[::2])
        public = {name: getattr(functional, name) for name in functional.__all__}
        public |= {"functional": functional, "use_backend": ops.use_backend}
        globals().update(public, __all__=[*public, *_ELSEWHERE])
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        """What there is, loaded or not: for completion in a shell."""
        return sorted({*globals(), *__getattr__("__all__"), *_PACKAGES})
