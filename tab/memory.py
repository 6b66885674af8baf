"""Memory that training frees on a CPU is kept for its next step.

glibc gives every large block back to the system, and the system clears its pages again in the next
step: for the `fair` CNN control that was 2.7 of 5.8 seconds of CPU an epoch.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> None:
    """For the whole process; at most TAB_KEEP_MIB (512 unless set) are kept once all is freed,
    with 0 nothing changes. Without glibc neither."""
    text = os.environ.get("TAB_KEEP_MIB") or "512"
    if not text.isdecimal():
        raise ValueError(f"TAB_KEEP_MIB={text} is no number of MiB")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or int(text) == 0:
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, min(int(text) << 20, 2**31 - 1))
    mallopt(_TOP_PAD, 64 << 20)  # the heap grows in few steps
