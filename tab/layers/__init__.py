"""The twelve attention layers and the controls beside them. Importing this package registers them,
in this order, and after them what else lies in this folder."""

import importlib
import pkgutil

from . import basic  # none, self, multi_head
from . import linear
from . import performer
from . import linformer
from . import sparse
from . import local
from . import kv_compression
from . import deepseek_mla
from . import kimi_k2
from . import flex
from . import controls  # none_again, ffn: no attention
from . import static_mixes  # uniform, mixer, random, dwconv: none either
from . import published  # forms of the published study, under no name of their own

from ._base import Attention, HeadsAttention
from ._registry import (
    attention_names,
    attention_options,
    build_attention,
    claimed_colours,
    control_names,
    get_attention,
    known_layer,
    layer_names,
    option_types,
    register_attention,
)
from ._stacking import stacks

__all__ = [
    "Attention",
    "HeadsAttention",
    "attention_names",
    "attention_options",
    "build_attention",
    "claimed_colours",
    "control_names",
    "get_attention",
    "known_layer",
    "layer_names",
    "option_types",
    "register_attention",
    "stacks",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
