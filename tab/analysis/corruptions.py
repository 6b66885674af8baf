"""Spoiled test images: five corruptions of our own, and the official arrays if the user has them.

Our own are NOT CIFAR-10-C: five kinds at five severities, drawn by torch from a seed, for data sets
that have no official corruptions. CIFAR-10-C: Hendrycks & Dietterich 2019, 15 corruptions, each
<name>.npy uint8 (50000, 32, 32, 3), the 10,000 test images at severity 1, then 2 … 5, and
labels.npy. CIFAR-10.1: Recht et al. 2018, 2,000 new test images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.cifar import CLASSES
from ..data.load import Dataset, Split

SIDE = 32  # of the official arrays

SEVERITIES = 5
OFFICIAL = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur"),
    *("motion_blur", "zoom_blur", "snow", "frost", "fog", "brightness", "contrast"),
    *("elastic_transform", "pixelate", "jpeg_compression"),
)
# --- our own: x (B, 3, H, W) in 0…1 -> the same, before it is cut to 0…1 -------------------------


def _noise(x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    return x + sigma * torch.randn(x.shape, generator=generator)


def _blur(x: Tensor, sigma: float, _) -> Tensor:
    """A Gaussian of σ pixels, cut at 3σ, one axis after the other; edges are mirrored."""
    reach = int(3 * sigma + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="reflect"), kernel, groups=3)
    return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="reflect"), kernel.mT, groups=3)


def _contrast(x: Tensor, left: float, _) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return mean + left * (x - mean)


def _brightness(x: Tensor, more: float, _) -> Tensor:
    return x + more


def _pixelate(x: Tensor, side: int, _) -> Tensor:
    """Means over side × side cells."""
    return F.interpolate(F.adaptive_avg_pool2d(x, side), size=x.shape[2:], mode="nearest")


OWN: dict[str, tuple[Callable, tuple[float, ...]]] = {  # kind -> what it does, its severities
    "noise": (_noise, (0.04, 0.08, 0.12, 0.16, 0.2)),
    "blur": (_blur, (0.5, 0.75, 1.0, 1.5, 2.0)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "pixelate": (_pixelate, (28, 20, 12, 10, 8)),
}


def corrupt(images: Tensor, kind: str, severity: int, *, seed: int = 0) -> Tensor:
    """uint8 (N, H, W, 3) -> uint8, at severity 1 … 5; the same for the same seed."""
    change, levels = OWN[kind]
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in images.split(2000):
        x = part.permute(0, 3, 1, 2).float() / 255
        x = change(x, levels[severity - 1], generator).clamp(0, 1)
        parts.append((x * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(parts).contiguous()


# --- official -------------------------------------------------------------------------------------


def check_cifar10c(folder: Path, dataset: Dataset) -> None:
    """An error now, rather than after an hour, if a file is missing or not what it should be."""
    _check_fits(dataset, "CIFAR-10-C")
    labels = _array(folder / "labels.npy", ())
    for name in OFFICIAL:
        _check_length(
            folder / f"{name}.npy", _array(folder / f"{name}.npy", (SIDE, SIDE, 3)), labels
        )


def cifar10c(folder: Path, name: str, severity: int) -> Split:
    """One corruption at severity 1 … 5."""
    images, labels = (
        _array(folder / f"{name}.npy", (SIDE, SIDE, 3)),
        _array(folder / "labels.npy", ()),
    )
    size = len(images) // SEVERITIES
    part = slice((severity - 1) * size, severity * size)
    return _split(images[part], labels[part])


def cifar101(folder: Path, dataset: Dataset) -> tuple[str, Split]:
    """("v6" or "v4", its images)."""
    _check_fits(dataset, "CIFAR-10.1")
    for version in ("v6", "v4"):
        path = folder / f"cifar10.1_{version}_data.npy"
        if path.is_file():
            labels = _array(folder / f"cifar10.1_{version}_labels.npy", ())
            images = _array(path, (SIDE, SIDE, 3))
            if len(images) != len(labels):
                raise ValueError(f"{path} has {len(images)} images, its labels are {len(labels)}")
            return version, _split(images, labels)
    raise ValueError(
        f"{folder} has no cifar10.1_v6_data.npy (nor v4): give the folder `datasets` of CIFAR-10.1"
    )


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(torch.from_numpy(np.array(images)), torch.from_numpy(labels.astype(np.int64)))


def _array(path: Path, tail: tuple[int, ...]) -> np.ndarray:
    """(N, *tail), mapped from disk; images are uint8, labels whole numbers 0 … 9."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the folder of the unpacked official files")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is no whole array ({error}): fetch it again") from None
    kind = "u" if tail else "ui"
    if array.shape[1:] != tail or array.ndim != 1 + len(tail) or array.dtype.kind not in kind:
        want = f"uint8 (N, {', '.join(map(str, tail))})" if tail else "integers (N,)"
        raise ValueError(
            f"{path} is {array.dtype} {array.shape}, not {want}: not the official file"
        )
    if not tail and len(array) and not 0 <= array.min() <= array.max() < len(CLASSES):
        raise ValueError(f"{path} has labels {array.min()} … {array.max()}, not 0 … 9")
    return array


def _check_length(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    if len(images) != len(labels) or not len(images) or len(images) % SEVERITIES:
        raise ValueError(
            f"{path} has {len(images)} images and labels.npy {len(labels)} labels: both are "
            f"{SEVERITIES} severities of one test set"
        )


def _check_fits(dataset: Dataset, what: str) -> None:
    if dataset.classes != CLASSES:
        raise ValueError(
            f"{what} has CIFAR-10's classes, {dataset.name} has {', '.join(dataset.classes)}: "
            "measure models that were trained on CIFAR-10"
        )
    if dataset.size != SIDE:
        raise ValueError(
            f"{what} has images of {SIDE}×{SIDE}, and {dataset.name} was read with {dataset.size}×"
            f"{dataset.size}: measure models that were trained at data.size = {SIDE}"
        )
