"""TAB, Transformer Attention Bench: which attention, how fast, and does it help?

What computes comes with torch, which takes a second to import, so it loads at first use (PEP 562):
`tab --help` does not wait for it.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"
_PACKAGES = ("functional", "layers", "ops")
_CALLED = ("bench", "compare", "sweep")  # packages, and functions of tab.api
# name -> where it lies, apart from the operators: these do not need what trains.
_ELSEWHERE = {"load_model": "train", "load_study": "api", "swap_attention": "models.swap"}

if TYPE_CHECKING:  # for type checkers and editors, which run nothing
    from . import functional as functional
    from . import layers as layers
    from . import ops as ops
    from .api import bench as bench
    from .api import compare as compare
    from .api import load_study as load_study
    from .api import sweep as sweep
    from .functional import *  # noqa: F403
    from .models.swap import swap_attention as swap_attention
    from .ops import use_backend as use_backend
    from .train import load_model as load_model
else:

    class _Callable(ModuleType):
        """A package that is named as a function is: `tab.compare(…)` calls tab.api's, and
        `tab.compare.driver` is a module of the package."""

        @property
        def __wrapped__(self):  # whose signature and docstring are shown
            return getattr(importlib.import_module("tab.api"), self.__name__.rpartition(".")[2])

        @property
        def __doc__(self):
            return self.__wrapped__.__doc__

        def __call__(self, *args, **options):
            from .ops._typed import typed

            return typed(self.__wrapped__)(*args, **options)

        def __reduce__(self):
            return importlib.import_module, (self.__name__,)

    class _Package(ModuleType):
        """This one. Python binds a package here when it is first imported, by whatever name."""

        def __setattr__(self, name, value):
            if name in _CALLED and isinstance(value, ModuleType):
                value.__class__ = _Callable
            super().__setattr__(name, value)

    sys.modules[__name__].__class__ = _Package

    def __getattr__(name: str):
        if name in _PACKAGES or name in _CALLED:
            return importlib.import_module(f"{__name__}.{name}")
        if name in _ELSEWHERE:
            return getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE[name]}"), name)
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        functional, ops = (importlib.import_module(f"{__name__}.{x}") for x in _PACKAGES[::2])
        public = {name: getattr(functional, name) for name in functional.__all__}
        public |= {"functional": functional, "use_backend": ops.use_backend}
        globals().update(public, __all__=[*public, *_CALLED, *_ELSEWHERE])
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        """What there is, loaded or not: for completion in a shell."""
        return sorted({*globals(), *__getattr__("__all__"), *_PACKAGES})
