"""The attention mechanisms as functions on (B, H, N, D) tensors."""

from .ops import (
    BlockPattern,
    H2OCache,
    h2o_attention,
    linear_attention,
    linformer_attention,
    local_attention,
    mla_attention,
    mla_decode,
    moe_experts,
    noaux_tc_gate,
    orthogonal_projection,
    performer_attention,
    sparse_attention,
)

__all__ = [
    "BlockPattern",
    "H2OCache",
    "h2o_attention",
    "linear_attention",
    "linformer_attention",
    "local_attention",
    "mla_attention",
    "mla_decode",
    "moe_experts",
    "noaux_tc_gate",
    "orthogonal_projection",
    "performer_attention",
    "sparse_attention",
]
