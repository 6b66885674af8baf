"""What a run ran on, how it was begun, how busy the machine was, and the memory it took."""

from __future__ import annotations

import os
import platform
import resource
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # `tab --help` does not wait for it


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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
