"""PyTorch's optimizers without its compiler, which takes longer to import than PyTorch itself."""

from __future__ import annotations

from inspect import unwrap

import torch


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


class SGD(Plain, torch.optim.SGD):
    """`torch.optim.SGD`, to the bit, likewise: with Nesterov's momentum m (Sutskever et al. 2013)
    v ← m·v + g and w ← w − lr·(g + m·v), where the decay is part of the gradient g.

        SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
    """

    step = torch.no_grad()(unwrap(torch.optim.SGD.step))
