"""What decoding remembers, a cache for each mechanism (docs/decoding.md)."""

from .gated_linear import GatedLinearCache as GatedLinearCache
from .kv import KVCache as KVCache
from .linear import LinearCache as LinearCache
from .local import LocalCache as LocalCache
from .mla import MLACache as MLACache
from .pages import PagePool as PagePool
from .performer import PerformerCache as PerformerCache
from .sparse import SparseCache as SparseCache
