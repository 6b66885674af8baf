"""The operators, one a file. Importing this package defines them all and loads their kernels."""

from . import batches as batches
from ._check import accumulate as accumulate
from ._check import check_key_mask as check_key_mask
from ._check import check_qkv as check_qkv
from ._check import token_major as token_major
from ._op import BACKENDS as BACKENDS
from ._op import OPS as OPS
from ._op import Op as Op
from ._op import choose as choose
from ._op import load_kernels as _load_kernels
from ._op import no_flops as no_flops
from ._op import use_backend as use_backend
from .decode_cache import DecodeCache as DecodeCache
from .gated_linear import gated_linear_attention as gated_linear_attention
from .h2o import h2o_attention as h2o_attention
from .h2o_cache import H2OCache as H2OCache
from .linear import linear_attention as linear_attention
from .linformer import linformer_attention as linformer_attention
from .local import local_attention as local_attention
from .merge import merge_attention as merge_attention
from .merge import merge_sinks as merge_sinks
from .mla import mla_attention as mla_attention
from .mla_decode import mla_decode as mla_decode
from .moe import moe_experts as moe_experts
from .pattern import BlockPattern as BlockPattern
from .performer import performer_attention as performer_attention
from .projection import orthogonal_projection as orthogonal_projection
from .router import noaux_tc_gate as noaux_tc_gate
from .sparse import sparse_attention as sparse_attention

_load_kernels()
