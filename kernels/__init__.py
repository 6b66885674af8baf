"""Triton kernels and launchers, one op a file. Imported as `tab.kernels`, never as `kernels`."""

if __name__ != "tab.kernels":
    raise ImportError(
        "TAB's Triton kernels are imported as `tab.kernels`; the bare name `kernels` belongs to "
        "another project. Install TAB (`pip install -e .`) and write `import tab.kernels`."
    )
