"""Floating-point operations of one forward pass, per image: matrix products and convolutions."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .models import IMAGE
from .ops import use_backend


def forward_flops(model: nn.Module) -> int:
    """FLOPs (two a multiply-add) of the model on one image, by running it on the CPU.

    Compiled kernels and fused attention are replaced by the plain products that define them.
    """
    x = torch.zeros(1, 3, IMAGE, IMAGE)
    training = model.training
    model.eval()
    plain = sdpa_kernel(SDPBackend.MATH), use_backend("reference"), torch.no_grad()
    with plain[0], plain[1], plain[2], FlopCounterMode(display=False) as counter:
        model(x)
    model.train(training)
    return counter.get_total_flops()
