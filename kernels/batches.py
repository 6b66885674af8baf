"""tab::assemble for CUDA in Triton (formula: tab/ops/batches.py).

One launch a batch: a program writes BLOCK neighbouring values of one image, channels last, and
reads each from where the move puts it. Nothing is staged: the images are bytes, and in the caches.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from ._launch import launch, meta_tensor, register, whole

BLOCK = 1024


@triton.jit
def assemble_images(
    images, index, moves, mean, scale, out,
    H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """images (N, H, W, 3) uint8 -> out (B, H, W, 3) float32"""
    b = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c, col, row = at % 3, at // 3 % W, at // 3 // W
    dy = tl.load(moves + 3 * b).to(tl.int32)
    dx = tl.load(moves + 3 * b + 1).to(tl.int32)
    mirror = tl.load(moves + 3 * b + 2) != 0
    x = tl.where(mirror, W - 1 - col, col) - dx
    y = row - dy
    here = at < 3 * H * W
    covered = here & (x >= 0) & (x < W) & (y >= 0) & (y < H)
    source = images + tl.load(index + b) * (3 * H * W) + (y * W + x) * 3 + c
    value = tl.load(source, mask=covered, other=0).to(tl.float32)
    value = (value - tl.load(mean + c)) * tl.load(scale + c)
    tl.store(out + b * (3 * H * W) + at, tl.where(covered, value, 0.0), mask=here)


# --- launcher -------------------------------------------------------------------------------------


def assemble(images, index, moves, mean, scale):
    """tab::assemble"""
    h, w = images.shape[1:3]
    out = torch.empty(len(index), h, w, 3, device=images.device)
    if len(index):
        launch(
            assemble_images, (len(index), cdiv(3 * h * w, BLOCK)),
            *whole(images, index, moves, mean, scale), out, H=h, W=w, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2)


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    images = meta_tensor(512, 32, 32, 3, dtype=torch.uint8)  # those that are drawn
    index, moves = meta_tensor(512, dtype=torch.int64), meta_tensor(512, 3, dtype=torch.int8)
    yield images, index, moves, meta_tensor(3), meta_tensor(3)


register("assemble", assemble, cases=cases)
