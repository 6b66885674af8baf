"""Whether the tests compile every launch that the kernels name, as a release is checked, and not
only those that stand for them (tab.doctor.kernel_launches.chosen)."""

import os

EVERY = bool(os.environ.get("TAB_EVERY_LAUNCH"))
