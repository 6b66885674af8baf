"""What a run ran on, how it was begun, how busy the machine was, the memory it takes, and what can
be done about an error of the system."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shlex
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import resource
except ImportError:  # Windows
    resource = None

if TYPE_CHECKING:
    import torch  # `tab --help` does not wait for it

_DO = {  # what a user can do about what the system says
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space on that disk"),
    errno.EROFS: "make that disk writable, or give another place",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions, or give another place"),
    **dict.fromkeys(
        (errno.EEXIST, errno.ENOTDIR),
        "a file is where a directory should be: give another name, or move the file away",
    ),
    errno.ENOENT: "check the name",
    errno.EISDIR: "that is a directory: give a file",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EIO: "that disk fails: give another place",
}

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def environment(device: str | torch.device = "cpu") -> dict:
    """What the numbers were measured with."""
    import torch

    device = torch.device(device)
    cuda = device.type == "cuda" and torch.cuda.is_available()  # or on another machine only
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
        "threads": torch.get_num_threads(),
        "load": load(),
    }


def load() -> float | None:
    """The system's load average over the last minute, where it keeps one."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


class Stopwatch:
    """What passes within `with`: `seconds` on the clock; `cpu`, processor time of all threads of
    this process; and `waited`, the seconds in which its worst off thread was ready to compute and
    had no core, as others had it (None where the system does not tell, as only Linux does)."""

    seconds: float
    cpu: float
    waited: float | None

    def __enter__(self) -> Stopwatch:
        self._begin = time.perf_counter(), time.process_time(), _waits()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu, before = self._begin
        after = _waits()
        self.cpu = time.process_time() - cpu  # within the clock's seconds, at both ends
        self.seconds = time.perf_counter() - wall
        waits = [ns - before.get(thread, 0) for thread, ns in after.items()]
        self.waited = min(max(waits) / 1e9, self.seconds) if before and waits else None


def _waits() -> dict[str, int]:
    """Thread of this process -> nanoseconds it has waited for a core so far; {} where not told."""
    found = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            ran, waited, _ = path.read_text().split()
        except (OSError, ValueError):  # a thread that has ended, or another system's format
            continue
        if int(ran):  # 0 of all where the kernel keeps no account
            found[path.parent.name] = int(waited)
    return found


def cores() -> int:
    """Those this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def command() -> str:
    """As it was typed."""
    program = Path(sys.argv[0])
    name = "tab" if program.name == "__main__.py" and program.parent.name == "tab" else program.name
    return shlex.join([name, *sys.argv[1:]])


def now() -> str:
    """Date, time and zone."""
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a GPU; of the whole process, from its start, on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        import psutil  # a dependency where `resource` is not in Python

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Memory that training frees on a CPU is kept for its next step. glibc gives every large block
    back to the system, which clears its pages again in the next step: for the `fair` CNN control
    that was 2.7 of 5.8 seconds of CPU an epoch.

    For the whole process; at most TAB_KEEP_MIB (512 unless set) are kept once all is freed,
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


def told(error: OSError) -> str:
    """The error as a user reads it: the file, what the system says, and, unless the error says so
    itself, what to do."""
    if error.errno is None or not error.strerror:
        return str(error)
    place = "" if error.filename is None else f"{error.filename}: "
    known = error.strerror.endswith(os.strerror(error.errno)) and error.errno in _DO
    return f"{place}{error.strerror}" + (f"; {_DO[error.errno]}" if known else "")
