"""The operators, one a file. Importing this package defines them all and loads their kernels."""

from . import batches
from ._check import accumulate, check_key_mask, check_qkv, token_major
from ._op import BACKENDS, OPS, Op, choose, load_kernels, no_flops, use_backend
from .h2o import h2o_attention
from .h2o_cache import H2OCache
from .linear import linear_attention
from .linformer import linformer_attention
from .local import local_attention
from .mla import mla_attention
from .mla_decode import mla_decode
from .moe import moe_experts
from .pattern import BlockPattern
from .performer import performer_attention
from .projection import orthogonal_projection
from .router import noaux_tc_gate
from .sparse import sparse_attention

load_kernels()

__all__ = [
    "BACKENDS",
    "OPS",
    "BlockPattern",
    "H2OCache",
    "Op",
    "accumulate",
    "batches",
    "check_key_mask",
    "check_qkv",
    "choose",
    "h2o_attention",
    "linear_attention",
    "linformer_attention",
    "local_attention",
    "mla_attention",
    "mla_decode",
    "moe_experts",
    "no_flops",
    "noaux_tc_gate",
    "orthogonal_projection",
    "performer_attention",
    "sparse_attention",
    "token_major",
    "use_backend",
]
