"""What each of two processes does in tests/layers/test_distributed.py: three steps of every layer,
each on its half of the batch, beside one process on all of it; and one of whole models."""

import copy
import os
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tab import local_attention, swap_attention
from tab.layers import build_attention

N, C, STEPS = 8, 16, 3
KINDS = {
    "multi_head": ("multi_head", {}),
    "linear": ("linear", {}),
    "linformer": ("linformer", {}),
    "local": ("local", {"window_size": 2}),
    "sparse": ("sparse", {"block_size": 2}),
    "kv_compression": ("kv_compression", {}),
    "flex": ("flex", {"pattern": "causal"}),
    "self": ("self", {}),
    "performer": ("performer", {"redraw_interval": 1, "num_features": 8}),
    "deepseek_mla": ("deepseek_mla", {"num_experts": 4, "top_k": 1, "bias_speed": 0.1}),
    "kimi_k2": ("kimi_k2", {"attention": "mha", "tau": 0.1, "bias_speed": 0.1}),
    "kimi_k2 mla": ("kimi_k2", {"attention": "mla", "tau": 0.1, "q_rank": 6, "bias_speed": 0.1}),
}


def build(kind: str):
    name, options = KINDS[kind]
    torch.manual_seed(0)
    return build_attention(name, C, seq_len=N, **options)


def state(layer) -> dict[str, torch.Tensor]:
    """Parameters and buffers, whole."""
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
        for name, t in layer.state_dict().items()
    }


def three_steps(kind: str, way: str, rank: int) -> tuple[dict, dict]:
    """-> this rank's layer, and that of one process which saw the whole batch."""
    layer = build(kind)
    alone = copy.deepcopy(layer)
    alone.after_step = lambda: type(alone).after_step(alone, NOBODY)
    run = DistributedDataParallel(layer, find_unused_parameters=True) if way == "ddp" else layer
    if way == "fsdp":
        fully_shard(layer)
    optimizers = [torch.optim.SGD(one.parameters(), 0.01) for one in (layer, alone)]
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        for _ in range(2):  # two forwards a step: DDP sends rank 0's buffers before each
            x = torch.randn(4, N, C, generator=generator)
            x[:2] *= 4  # the ranks see different data
            run(x[2 * rank : 2 * rank + 2]).square().mean().backward()
            alone(x).square().mean().backward()
        for optimizer, one in zip(optimizers, (layer, alone), strict=True):
            optimizer.step()
            optimizer.zero_grad()
            one.after_step()
    return state(layer), state(alone)


class Windows(nn.Module):
    """A model of somebody's own, with an operator of TAB's in it."""

    def __init__(self):
        super().__init__()
        self.project, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, -1)) for t in self.project(x).chunk(3, -1))
        return self.out(local_attention(q, k, v, window=2, layout="bnhd").flatten(2))


def encoder() -> nn.Module:
    """PyTorch's, with another attention."""
    block = nn.TransformerEncoderLayer(C, 4, 2 * C, dropout=0.0, batch_first=True)
    whole = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
    return swap_attention(whole, "performer", seq_len=N)


MODELS = {"an operator": Windows, "a swapped encoder": encoder}


def gradients(name: str, way: str, rank: int) -> tuple[dict, dict]:
    """-> this rank's of a model that both have, and those of one process on the whole batch."""
    torch.manual_seed(0)
    model = MODELS[name]()
    alone = copy.deepcopy(model)
    run = DistributedDataParallel(model) if way == "ddp" else model
    if way == "fsdp":
        for part in model.modules():
            if isinstance(part, nn.TransformerEncoderLayer):
                fully_shard(part)
        fully_shard(model)
    x = torch.randn(4, N, C, generator=torch.Generator().manual_seed(5))
    run(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    alone(x).square().mean().backward()
    return tuple(
        {
            name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for name, p in one.named_parameters()
        }
        for one in (model, alone)
    )


def work(rank: int, folder: str) -> None:
    """One process: writes {(kind, way): (state, state of one process)}."""
    global NOBODY
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    NOBODY = [dist.new_group([r]) for r in range(2)][rank]  # a group of its own for each
    found = {(k, way): three_steps(k, way, rank) for k in KINDS for way in ("ddp", "fsdp")}
    found |= {(name, way): gradients(name, way, rank) for name in MODELS for way in ("ddp", "fsdp")}
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()
