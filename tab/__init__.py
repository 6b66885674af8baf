"""TAB, Transformer Attention Bench: which attention, how fast, and does it help?

The operators come with torch, which takes a second to import, so they load at first use
(PEP 562): `tab --help` does not wait for them.
"""

import importlib

__version__ = "0.1.0"
_PACKAGES = ("functional", "layers", "ops")


def __getattr__(name: str):
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "load_model":  # apart: operators do not need what trains
        return importlib.import_module(f"{__name__}.train").load_model
    if name.startswith("__") and name != "__all__":
        raise AttributeError(name)
    functional, ops = (importlib.import_module(f"{__name__}.{part}") for part in _PACKAGES[::2])
    public = {name: getattr(functional, name) for name in functional.__all__}
    public |= {"functional": functional, "use_backend": ops.use_backend}
    globals().update(public, __all__=[*public, "load_model"])
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]
