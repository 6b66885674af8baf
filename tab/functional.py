"""The attention mechanisms as functions on (B, H, N, D) tensors: what `tab` offers, one a line."""

from .ops import BlockPattern as BlockPattern
from .ops import DecodeCache as DecodeCache
from .ops import H2OCache as H2OCache
from .ops import gated_linear_attention as gated_linear_attention
from .ops import h2o_attention as h2o_attention
from .ops import linear_attention as linear_attention
from .ops import linformer_attention as linformer_attention
from .ops import local_attention as local_attention
from .ops import merge_attention as merge_attention
from .ops import merge_sinks as merge_sinks
from .ops import mla_attention as mla_attention
from .ops import mla_decode as mla_decode
from .ops import moe_experts as moe_experts
from .ops import noaux_tc_gate as noaux_tc_gate
from .ops import orthogonal_projection as orthogonal_projection
from .ops import performer_attention as performer_attention
from .ops import sparse_attention as sparse_attention
from .ops.decode import GatedLinearCache as GatedLinearCache
from .ops.decode import KVCache as KVCache
from .ops.decode import LinearCache as LinearCache
from .ops.decode import LocalCache as LocalCache
from .ops.decode import MLACache as MLACache
from .ops.decode import PagePool as PagePool
from .ops.decode import PerformerCache as PerformerCache
from .ops.decode import SparseCache as SparseCache

# Type checkers read no list that is computed: without one, they take every name above.
globals()["__all__"] = [name for name in dir() if not name.startswith("_")]
