"""Who takes part in `tab bench decode`: TAB's caches, and decoding in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import (
    BlockPattern,
    DecodeCache,
    H2OCache,
    accumulate,
    gated_linear_attention,
    linear_attention,
    local_attention,
    mla_attention,
    orthogonal_projection,
    performer_attention,
    sparse_attention,
)
from ..ops.decode import (
    GatedLinearCache,
    KVCache,
    LinearCache,
    LocalCache,
    MLACache,
    PagePool,
    PerformerCache,
    SparseCache,
)
from . import decode_rivals as rivals

STEPS = 8  # that are checked
ROUNDS = 200  # tokens that a process decodes at most
ROOM = 2 * ROUNDS  # rows for them
BLOCK, PAGE, FEATURES = 64, 64, 256
Step = Callable[..., Tensor]


@dataclass(frozen=True)
class Setting:
    """N tokens that were before, in a batch of sequences. window: tokens that local, sparse and H2O
    keep, a multiple of BLOCK. The latent has 4·D numbers and the rotary key D/2 (DeepSeek-V2 2024,
    sec. 2.1)."""

    tokens: int
    batch: int = 4
    heads: int = 8
    kv_heads: int = 8
    width: int = 64
    window: int = 256
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def name(self) -> str:
        heads = f"h{self.heads}" + (f"kv{self.kv_heads}" if self.kv_heads != self.heads else "")
        sizes = f"b{self.batch}{heads}d{self.width}w{self.window}"
        return f"decode/n{self.tokens}/{sizes}/{str(self.dtype).removeprefix('torch.')}"

    def draw(self, tokens: int, latent: bool, seed: int) -> tuple[Tensor, ...]:
        """q, k and v, or what latent attention has in their place, and its two matrices."""
        generator = torch.Generator().manual_seed(seed)
        b, h, d, kv = self.batch, self.heads, self.width, self.kv_heads
        shapes = (b, h, tokens, d), (b, kv, tokens, d), (b, kv, tokens, d)
        if latent:
            r, dr = 4 * d, d // 2
            shapes = (b, h, tokens, d), (b, h, tokens, dr), (b, tokens, r), (b, tokens, dr)
            shapes = (*shapes, (h, d, r), (h, d, r))
        drawn = [torch.randn(shape, generator=generator) for shape in shapes]
        drawn = [x * x.shape[-1] ** -0.5 if i > 3 else x for i, x in enumerate(drawn)]
        return tuple(x.to(self.device, self.dtype) for x in drawn)


@dataclass(frozen=True)
class Decoder:
    """begin: (setting, prompt) -> its step, and the bytes that it holds. whole: what all tokens
    would have given, for float64."""

    name: str
    begin: Callable[[Setting, tuple[Tensor, ...]], tuple[Step, Callable[[], int]]]
    whole: Callable[[Setting, tuple[Tensor, ...]], Tensor]
    latent: bool = False
    grouped: bool = True


def split(x: Sequence[Tensor], last: int) -> list[tuple[Tensor, ...]]:
    """The prompt, and each of the last tokens, with the matrices in the prompt's tuple."""
    n = x[0].shape[-2]
    tensors, matrices = x[:4], x[4:]
    ends = [n - last, *(n - last + 1 + i for i in range(last))]
    cuts = [tuple(t[..., a:b, :] for t in tensors) for a, b in zip([0, *ends], ends, strict=False)]
    return [(*cuts[0], *matrices), *cuts[1:]]


# --- who takes part -------------------------------------------------------------------------------


def _ours(cache: DecodeCache, prompt: Sequence[Tensor], chunk: int = 1 << 20):
    for start in range(0, prompt[0].shape[-2], chunk):
        cache.prefill(*(x[..., start : start + chunk, :] for x in prompt))
    return cache.step, lambda: cache.bytes


def _theirs(rival):
    return rival.step, lambda: sum(x.nbytes for x in rival.held)


def _kv(setting: Setting, prompt):
    """Loaded, as the attention among the tokens of a prompt would take long."""
    cache = KVCache(capacity=prompt[1].shape[2] + ROOM)
    length = torch.tensor(prompt[1].shape[2])
    cache.load_state_dict({"length": length, "k": prompt[1], "v": prompt[2]})
    return cache.step, lambda: cache.bytes


def _mla(setting: Setting, prompt, paged: bool):
    *tokens, w_uk, w_uv = prompt
    n, rows = tokens[2].shape[1], torch.cat(tokens[2:], -1)
    pool = None
    if paged:
        pages = setting.batch * -(-(n + ROOM) // PAGE)
        size = {"page_size": PAGE, "width": rows.shape[2]}
        pool = PagePool(pages=pages, **size, dtype=rows.dtype, device=rows.device)
    cache = MLACache(w_uk, w_uv, pool=pool, capacity=0 if paged else n + ROOM)
    lengths = torch.full((setting.batch,), n)
    cache.load_state_dict({"length": torch.tensor(n), "rows": rows, "lengths": lengths})
    return cache.step, lambda: cache.bytes


def _window(setting: Setting) -> int:
    return setting.window - 1  # tokens before the own


def _pattern(setting: Setting, tokens: int) -> BlockPattern:
    """A sink and the last blocks, `window` tokens in all."""
    blocks = setting.window // BLOCK - 1
    return BlockPattern.sliding_window(tokens, window=blocks, sinks=1, block_size=BLOCK)


def _projection(setting: Setting, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    w = orthogonal_projection(FEATURES, setting.width, generator=generator)
    return w.to(like.device, accumulate(like))


def _decay(setting: Setting, like: Tensor) -> Tensor:
    """Of each head: retention's."""
    decay = torch.log(1 - 2.0 ** (-5 - torch.arange(setting.kv_heads)))
    return decay.to(like.device, accumulate(like))


def _gated(setting: Setting, prompt):
    cache, decay = GatedLinearCache(), _decay(setting, prompt[0])
    cache.prefill(*prompt, decay)
    return (lambda *x: cache.step(*x, decay)), lambda: cache.bytes


def _whole_gated(setting: Setting, x) -> Tensor:
    return gated_linear_attention(*x, _decay(setting, x[0]), backend="reference")


def _h2o(setting: Setting, prompt, chunk: int = 256):
    heavy = setting.window // 2
    return _ours(H2OCache(heavy=heavy, recent=setting.window - heavy), prompt, chunk)


def _whole_h2o(setting: Setting, x) -> Tensor:
    """The algorithm itself in float64, whose choices the prompt's chunks decide."""
    prompt, *tokens = split(x, STEPS)
    step, _ = _h2o(setting, prompt)
    return F.pad(torch.cat([step(*t) for t in tokens], 2), (0, 0, x[0].shape[2] - STEPS, 0))


def _whole_sdpa(setting: Setting, x) -> Tensor:
    return F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)


def _whole_linear(setting: Setting, x) -> Tensor:
    return linear_attention(*x, causal=True, backend="reference")


def _whole_performer(setting: Setting, x) -> Tensor:
    w = _projection(setting, x[0])
    return performer_attention(*x, w, causal=True, backend="reference")


def _whole_local(setting: Setting, x) -> Tensor:
    return local_attention(*x, window=_window(setting), causal=True, backend="reference")


def _whole_sparse(setting: Setting, x) -> Tensor:
    pattern = _pattern(setting, x[0].shape[2])
    return sparse_attention(*x, pattern, causal=True, backend="reference")


def _whole_mla(setting: Setting, x) -> Tensor:
    return mla_attention(*x, causal=True, form="expand")


DECODERS = (
    Decoder("tab kv", _kv, _whole_sdpa),
    Decoder("tab linear", lambda s, x: _ours(LinearCache(), x), _whole_linear),
    Decoder("tab gated", _gated, _whole_gated),
    Decoder(
        "tab performer", lambda s, x: _ours(PerformerCache(_projection(s, x[0])), x),
        _whole_performer,
    ),
    Decoder("tab local", lambda s, x: _ours(LocalCache(window=_window(s)), x), _whole_local),
    Decoder(
        "tab sparse",
        lambda s, x: _ours(SparseCache(_pattern(s, x[0].shape[2] + ROOM)), x),
        _whole_sparse,
    ),
    Decoder("tab h2o", _h2o, _whole_h2o, grouped=False),
    Decoder("tab mla", partial(_mla, paged=False), _whole_mla, latent=True),
    Decoder("tab mla pages", partial(_mla, paged=True), _whole_mla, latent=True),
    Decoder("sdpa", lambda s, x: _theirs(rivals.Sdpa(*x, ROOM)), _whole_sdpa),
    Decoder(
        "recurrent linear", lambda s, x: _theirs(rivals.Recurrent(*x)), _whole_linear,
        grouped=False,
    ),
    Decoder(
        "recurrent gated",
        lambda s, x: _theirs(rivals.RecurrentGated(*x, _decay(s, x[0]))),
        _whole_gated,
        grouped=False,
    ),
    Decoder(
        "eager linear", lambda s, x: _theirs(rivals.EagerLinear(*x)), _whole_linear, grouped=False
    ),
    Decoder(
        "eager performer",
        lambda s, x: _theirs(rivals.EagerPerformer(*x, _projection(s, x[0]))),
        _whole_performer,
        grouped=False,
    ),
    Decoder(
        "eager local", lambda s, x: _theirs(rivals.EagerLocal(*x, _window(s))), _whole_local,
        grouped=False,
    ),
    Decoder(
        "eager mla", lambda s, x: _theirs(rivals.EagerLatents(x[:4], *x[4:], ROOM)), _whole_mla,
        latent=True,
    ),
)  # fmt: skip


def names() -> list[str]:
    return [one.name for one in DECODERS]
