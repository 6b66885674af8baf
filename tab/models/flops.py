"""Floating-point operations of one forward pass, per image: matrix products and convolutions.

PyTorch's counter knows its own operators. TAB's carry their own formulas (`Op.flops`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..ops import OPS


def forward_flops(model: nn.Module) -> int:
    """FLOPs of the model on one image, by running it once where it is: on the CPU, or on meta."""
    return flops_on(model, model.backbone.example())


def flops_on(module: nn.Module, x: Tensor) -> int:
    """FLOPs of the module, in eval mode, on this input."""
    x = x.to(next((p.device for p in module.parameters()), x.device))
    training = module.training
    module.eval()
    counter = Counter()
    # Fused softmax attention is taken apart into the two products that define it.
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        module(x)
    module.train(training)
    return counter.total


class Counter(TorchDispatchMode):
    """The sum of all operators that have a formula. As FlopCounterMode counts them, which also says
    which module did what, and loads torch.compile whole, seconds, to be left alone by it."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.formulas = _pytorchs().flop_registry

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):  # as cond, of other operators
            with _pytorchs() as counter:
                out = func(*args, **kwargs)
            self.total += counter.get_total_flops()
            return out
        formula = self.formulas.get(func._overloadpacket)
        if formula is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def _pytorchs() -> FlopCounterMode:
    ours = {getattr(torch.ops.tab, name): op.flops for name, op in OPS.items()}
    return FlopCounterMode(display=False, custom_mapping=ours)
