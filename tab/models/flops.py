"""Floating-point operations of one forward pass, per image: matrix products and convolutions.

PyTorch's counter knows its own operators. TAB's carry their own formulas (`Op.flops`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..ops import OPS


def forward_flops(model: nn.Module) -> int:
    """FLOPs of the model on one image, by running it once where it is: on the CPU, or on meta."""
    return flops_on(model, model.backbone.example())


def flops_on(module: nn.Module, x: Tensor) -> int:
    """FLOPs of the module, in eval mode, on this input."""
    mapping = {getattr(torch.ops.tab, name): op.flops for name, op in OPS.items()}
    x = x.to(next((p.device for p in module.parameters()), x.device))
    training = module.training
    module.eval()
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    # Fused softmax attention is taken apart into the two products that define it.
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        module(x)
    module.train(training)
    return counter.get_total_flops()
