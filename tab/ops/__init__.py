"""The operators, one a file. Importing this package defines them all and loads their kernels."""

from ._op import BACKENDS, OPS, load_kernels, use_backend
from .linear import linear_attention
from .local import local_attention
from .pattern import BlockPattern
from .sparse import sparse_attention

# Files of kernels/ that register ops.
TRITON_MODULES: tuple[str, ...] = ("linear", "linear_backward")

load_kernels(TRITON_MODULES)

__all__ = [
    "BACKENDS",
    "OPS",
    "BlockPattern",
    "linear_attention",
    "local_attention",
    "sparse_attention",
    "use_backend",
]
