"""Checkpoints: a `.pt` file is what torch.save writes, a zip archive, which torch.load reads too.

Its checksum is the archive's comment, "tab sha256 <hex>", verified before anything is unpickled.
(Version 0.1 wrote it as a line before the archive, which is still read.)
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import torch

from ..files import Corrupt, write

_MARK = b"tab sha256 "
_SUM = len(_MARK) + 64


def save(path: Path, state: object) -> None:
    """Writes tensors and plain values, atomically, with their checksum."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    # An archive ends with the length of its comment, in two bytes, and the comment.
    data = buffer.getvalue()[:-2] + _SUM.to_bytes(2, "little")
    write(path, data + _sum(data), own=True)


def load(path: Path, device: str | torch.device = "cpu") -> dict:
    """What `save` wrote; Corrupt if a byte differs."""
    raw = path.read_bytes()
    if raw.startswith(_MARK):
        data, found = raw[_SUM + 1 :], raw[:_SUM]
    else:
        data, found = raw[:-_SUM], raw[-_SUM:]
    if found != _sum(data):
        raise Corrupt(f"{path} is truncated or altered ({len(raw)} bytes): its checksum differs")
    whole = data if raw.startswith(_MARK) else raw
    return torch.load(io.BytesIO(whole), map_location=device, weights_only=True)


def _sum(data: bytes) -> bytes:
    return _MARK + hashlib.sha256(data).hexdigest().encode()
