"""What a run ran on, and the memory it took."""

from __future__ import annotations

import platform
import resource
import sys

import torch


def environment(device: str | torch.device = "cpu") -> dict:
    """What the numbers were measured with."""
    device = torch.device(device)
    cuda = device.type == "cuda" and torch.cuda.is_available()  # or on another machine only
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
        "threads": torch.get_num_threads(),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a GPU; of the whole process, from its start, on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
