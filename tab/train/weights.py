"""Trained weights as model.safetensors, a format that any program reads:

    safetensors.torch.load_file("RUN/model.safetensors")      name -> tensor
    tab.load_model("RUN")                                      the model itself, in eval mode

Its metadata has one entry, "tab", which is JSON with all that it takes to build the model again:

    tab            the version that wrote it
    config         of the run, as in run.json
    classes        their names, in the order of the logits
    mean, scale    what the model takes is x[c] = (pixel[c] − mean[c])·scale[c], pixels in 0 … 255
    sha256         of the other entries, as JSON with sorted keys and in ASCII, then of each tensor
                   in the order of their names: its name, and its bytes
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TypedDict

import safetensors.torch
import torch
from torch import Tensor

from .. import __version__
from ..files import write
from ..files.formats import check, reading

FILE = "model.safetensors"
Weights = dict[str, Tensor]


class About(TypedDict):
    """Of the metadata: what is read by name."""

    config: dict
    classes: list[str]
    sha256: str


def save_weights(path: Path, weights: Weights, about: dict) -> None:
    """Writes model.safetensors, with `about` and a checksum of both in its metadata."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    about = {"tab": __version__, **about}
    about["sha256"] = _digest(about, weights)
    # In one entry, as the order of several is not the same from one time to the next.
    write(path, safetensors.torch.save(weights, {"tab": json.dumps(about)}), own=True)


def load_weights(path: Path, way_out: str) -> tuple[Weights, About]:
    """The tensors and the metadata; Corrupt if anything in either differs from what was written."""
    with reading(path, way_out), safetensors.safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = check("its metadata", json.loads((file.metadata() or {})["tab"]), About)
        if about["sha256"] != _digest(about, weights):
            raise ValueError("its checksum differs")
        return weights, about


def _digest(about: dict, weights: Weights) -> str:
    rest = {key: value for key, value in about.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
