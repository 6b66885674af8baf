"""AdamW without torch's compiler, whose import takes a process longer than PyTorch's own."""

from __future__ import annotations

from inspect import unwrap

import torch


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, to the bit: its arguments, its updates (Loshchilov & Hutter 2019,
    [Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101), algorithm 2) and its
    state dict, which either loads of the other.

    PyTorch wraps these methods so that torch.compile leaves them alone, and to say so loads all of
    the compiler (torch._dynamo, SymPy, torch.distributed) in the first call. Here they are as they
    are written. What is compiled in training is the model, never the step of its optimizer.

        AdamW(model.parameters(), lr=1e-3, fused=True)
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))
