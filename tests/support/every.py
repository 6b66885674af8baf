"""How many of the launches that the kernels name the tests compile, beside those that stand for
them (tab.doctor.kernel_launches.chosen)."""

import os

EVERY = bool(os.environ.get("TAB_EVERY_LAUNCH"))  # all, before a release
# One of each form (kernel, precision, switches), with another Triton than the one that compiles
# those that stand for all.
FORMS = not EVERY and bool(os.environ.get("TAB_FORMS"))
