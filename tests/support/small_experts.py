"""The layers deepseek_mla and kimi_k2 at the size of their tests."""

import torch

from tab.layers import build_attention

KINDS = {
    "deepseek": ("deepseek_mla", {}),
    "deepseek-q": ("deepseek_mla", {"q_rank": 6, "n_group": 4, "topk_group": 2}),
    "kimi-mha": ("kimi_k2", {"attention": "mha"}),
    "kimi-mla": ("kimi_k2", {"attention": "mla"}),
}


def build(kind, dim=24, *, seq_len=65, seed=0, **options):
    name, fixed = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_attention(name, dim, seq_len=seq_len, **{"num_heads": 3, **fixed, **options})


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
