"""Triton kernels and launchers, one op a file. Imported as `tab.kernels`, never as `kernels`."""

import importlib
import pkgutil

if __name__ != "tab.kernels":
    raise ImportError(
        "TAB's Triton kernels are imported as `tab.kernels`; the bare name `kernels` belongs to "
        "another project. Install TAB (`pip install -e .`) and write `import tab.kernels`."
    )


def load() -> None:
    """Imports every file of this folder; each registers its launchers with the ops."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
