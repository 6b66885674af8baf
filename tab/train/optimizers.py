"""PyTorch's optimizers without its compiler, which takes longer to import than PyTorch itself; and
their steps as a part of a CUDA graph."""

from __future__ import annotations

from inspect import unwrap

import torch
from torch import Tensor


class Plain:
    """Their methods as they are written.

    PyTorch wraps them so that torch.compile leaves them alone, and to say so loads all of the
    compiler (torch._dynamo, SymPy, torch.distributed) in the first call. What is compiled in
    training is the model, never the step of its optimizer.
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(Plain, torch.optim.AdamW):
    """`torch.optim.AdamW`, to the bit: its arguments, its updates (Loshchilov & Hutter 2019,
    [Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101), algorithm 2) and its
    state dict, which either loads of the other.

        AdamW(model.parameters(), lr=1e-3, fused=True)
    """

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))
    holds = ("step", "exp_avg", "exp_avg_sq")


class SGD(Plain, torch.optim.SGD):
    """`torch.optim.SGD`, to the bit, likewise: with Nesterov's momentum m (Sutskever et al. 2013)
    v ← m·v + g and w ← w − lr·(g + m·v), where the decay is part of the gradient g.

        SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
    """

    step = torch.no_grad()(unwrap(torch.optim.SGD.step))
    holds = ("momentum_buffer",)


class InGraph:
    """The steps of an optimizer that a CUDA graph repeats. A capture would freeze the rate, which a
    schedule moves: it lies on the device, where PyTorch's fused kernels read it."""

    def __init__(self, optimizer: AdamW | SGD, device: torch.device):
        self.optimizer = optimizer
        self.rates = torch.zeros(len(optimizer.param_groups), device=device)

    def feed(self) -> None:
        """Before each step: the rates that the groups have now, in one copy."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.rates.copy_(torch.tensor(rates), non_blocking=True)

    def step(self) -> None:
        """Reads nothing that is another in the next step but tensors of the device."""
        groups = self.optimizer.param_groups
        before = [dict(group) for group in groups]
        try:
            for group, rate in zip(groups, self.rates, strict=True):
                for p in group["params"]:
                    self._begin(p)
                group |= {"lr": rate} | ({"capturable": True} if "capturable" in group else {})
            self.optimizer.step()
        finally:
            for group, values in zip(groups, before, strict=True):
                group |= values

    def _begin(self, p: Tensor) -> None:
        """What is held of it before its first step: a capture may not begin with one."""
        if p.grad is not None and not self.optimizer.state[p]:
            self.optimizer.state[p] = {
                name: torch.zeros_like(p.detach() if name != "step" else self.rates[0])
                for name in self.optimizer.holds
            }


def held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What it knows of earlier steps."""
    return [x for own in optimizer.state.values() for x in own.values()]
