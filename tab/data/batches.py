"""Batches of a uint8 image set: order and augmentation are functions of (seed, epoch) only.

    x[b, c, row, col] = (image[row − dy, col − dx, c] − mean_c) / std_c,   then mirrored or not

dy, dx uniform in −translate … translate pixels, mirrored with probability ½. Pixels that the moved
image leaves uncovered take the mean colour, which is 0 after normalisation; so do those of a
square, if one is cut out (DeVries & Taylor 2017). Flips may alternate: an image is then mirrored in
every second epoch, and half of them are in the first (Jordan 2024, "94% on CIFAR-10 in 3.29
Seconds"), so that two epochs show each image both ways. On the CPU one pass in
C++ threads writes each batch (host.py); on another device the uint8 set lives there and one
kernel does the same, to the same bits (tab/ops/batches.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..ops.batches import assemble
from . import host
from .load import Split


class Batches:
    """One split cut into batches (x (B, 3, H, W) float32 channels_last, y (B,) int64) on `device`.

    mean, std (3,): per channel, in 0…255 units (`tab.data.statistics` of the training images).
    shuffle: a new order each epoch. translate: pixels. flip: mirror left-right with probability ½,
    or `alternating`. cutout: side of a square that is blanked, 0 for none.
    drop_last: leave out an incomplete last batch. index (M,) int64: only these images.
    threads: for assembly on the CPU; torch's own number by default.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        mean: Tensor,
        std: Tensor,
        seed: int = 0,
        shuffle: bool = False,
        translate: int = 0,
        flip: bool = False,
        alternating: bool = False,
        cutout: int = 0,
        drop_last: bool = False,
        device: str | torch.device = "cpu",
        index: Tensor | None = None,
        threads: int | None = None,
    ):
        count, side = len(split.images), min(split.images.shape[1:3])
        index = torch.arange(count) if index is None else torch.as_tensor(index).cpu()
        if index.dtype != torch.int64 or index.dim() != 1:
            raise ValueError(
                f"index must be int64 (M,), got {index.dtype} {tuple(index.shape)}; "
                "for a mask, give mask.nonzero().flatten()"
            )
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= count):
            raise ValueError(
                f"index runs from {int(index.min())} to {int(index.max())}, "
                f"but the images are numbered 0…{count - 1}"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be 1 or more")
        samples = len(index) // batch_size * batch_size if drop_last else len(index)
        if samples == 0:
            raise ValueError(
                f"no batch: {len(index)} images, batch_size {batch_size}, drop_last {drop_last}; "
                f"take a batch_size of at most {max(len(index), 1)}"
            )
        if not 0 <= translate < min(side, 128):
            raise ValueError(
                f"translate {translate} must be 0…{min(side, 128) - 1} pixels for images of "
                f"{tuple(split.images.shape[1:3])}"
            )
        if not 0 <= cutout <= side:
            raise ValueError(f"cutout {cutout} must be 0…{side} pixels of {side}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads {threads} must be 1 or more; None takes torch's number")
        self.device = torch.device(device)
        mean, scale = _normaliser(mean, std)
        # On the device at once: a copy in each batch would make the host wait.
        self.mean, self.scale = mean.to(self.device), scale.to(self.device)
        if self.device.type == "cuda" and (reason := assemble.why_not("triton")):
            warnings.warn(f"batches are assembled by several operations: {reason}", stacklevel=2)
        self.batch_size, self.samples, self.seed = batch_size, samples, seed
        self.shuffle, self.translate, self.flip = shuffle, translate, flip
        self.alternating, self.cutout = alternating, cutout
        self.threads = threads or torch.get_num_threads()
        self.index = index.contiguous()
        self.images = split.images.contiguous().to(self.device)  # (N, H, W, 3) uint8
        self.labels = split.labels.to(self.device)  # (N,)

    @property
    def answers(self) -> int:
        """Questions in an epoch: one an image."""
        return self.samples

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-self.samples // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of this epoch: the same whenever, and on whatever device, they are asked.

        Each is assembled when it is asked for. Assembling the next one in the background was tried
        and gained nothing: a batch of 512 takes about 1 ms, its training step 100 ms and more.
        """
        if epoch < 0:
            raise ValueError(f"epoch {epoch} must be 0 or more")
        seed, index = self.seed % 2**64, self.index
        if self.shuffle:
            generator = torch.Generator().manual_seed(host.hash(seed, epoch))
            index = index[torch.randperm(len(index), generator=generator)]
        index = index[: self.samples]  # (M,)
        moves = host.moves(seed, epoch, index, self.translate, self.flip)  # (M, 3)
        if self.flip and self.alternating:
            moves[:, 2] = host.moves(seed, 0, index, 0, True)[:, 2] ^ (epoch & 1)
        moves = moves.to(self.device)
        corners: Tensor | None = None
        if self.cutout:
            room = [n - self.cutout + 1 for n in self.images.shape[1:3]]
            corners = host.corners(seed, epoch, index, *room).to(self.device)  # (M, 2)
        index = index.to(self.device)

        def batch(start: int) -> tuple[Tensor, Tensor]:
            part = slice(start, start + self.batch_size)
            given = self.images, index[part], moves[part], self.mean, self.scale
            on_host = self.device.type == "cpu"
            x = host.assemble_host(*given, self.threads) if on_host else assemble("auto", *given)
            if corners is not None:
                x.mul_(_outside(corners[part], self.cutout, *x.shape[2:]))
            return x, self.labels[index[part]]

        return (batch(start) for start in range(0, self.samples, self.batch_size))


def _outside(corners: Tensor, side: int, rows: int, cols: int) -> Tensor:
    """(B, 1, rows, cols): 0 in the square of that side from corners (B, 2) on, else 1."""
    within = []
    for corner, n in zip(corners.T, (rows, cols), strict=True):
        i = torch.arange(n, device=corners.device) - corner[:, None]
        within.append((i >= 0) & (i < side))  # (B, n)
    row, col = within
    return (~(row[:, :, None] & col[:, None])).float()[:, None]


def _normaliser(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, 1/std) as float32 (3,), the reciprocal taken in float64."""
    mean, std = (torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (mean, std))
    if mean.shape != (3,) or std.shape != (3,):
        raise ValueError(f"mean and std must be (3,), got {tuple(mean.shape)}, {tuple(std.shape)}")
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise ValueError(
            f"mean {mean.tolist()} must be finite and std {std.tolist()} above 0; a channel that "
            "is constant over all images cannot be normalised: give its std as 1"
        )
    return mean.float(), (1 / std).float()
