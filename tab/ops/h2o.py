"""H2O: attention to a bounded cache of heavy hitters and recent tokens, chosen per head.

Zhang et al. 2023, "H2O: Heavy-Hitter Oracle", algorithm 1. The cache S holds budget = heavy +
recent slots (k_j, v_j, A_j). A token is appended with A = 0 and attends S with itself, p = softmax;
A += p; over budget, the slot of least A among those older than the last `recent` leaves for good.

Each batch entry and head keeps its own tokens. Which ones is a constant for the gradient.
`H2OCache.step` is the algorithm. For a whole sequence the choices are made first, by an op without
a gradient (h2o_choice.py), and a second op attends to them, block of queries by block
(h2o_attend.py).
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from ._check import Layout, as_given, check_key_mask, check_qkv, heads_first, real
from ._options import check_causal, whole
from ._softmax import score_scale
from .h2o_attend import h2o_attend
from .h2o_cache import check_budget
from .h2o_choice import h2o_choose, h2o_choose_exact

Mode = Literal["streaming", "exact"]
MODES: tuple[str, ...] = get_args(Mode)


def h2o_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heavy: int,
    recent: int,
    causal: bool = False,
    is_causal: bool | None = None,
    mode: Mode = "streaming",
    block: int = 64,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    layout: Layout = "bhnd",
) -> Tensor:
    """Attention through a cache of heavy + recent tokens per head, `o_i = Σ_j p_ij v_j` with
    p_i = softmax over the cache S_i, whose heavy hitters have the largest A_j = Σ_{t<i} p_tj
    (Zhang et al. 2023, algorithm 1).

    mode "streaming", O(N·(budget + block)) memory: one pass over the tokens in blocks. The queries
    of a block attend the cache (what earlier blocks left in it) and their own block, then the cache
    takes the block in and evicts down to its budget: the last `recent` tokens, and of the others
    the `heavy` that were attended most so far. block=1 with causal=True is algorithm 1, token by
    token. `causal` decides only about the own block (all of it, or j ≤ i): blocks that come later
    are never seen, since their tokens are not there yet. With N ≤ block this is full attention.

    mode "exact", O(N²) memory: the scores of full attention choose, then the queries attend again,
    now only to the chosen. Bidirectional: one choice for all queries, A_j = Σ_i P_ij. Causal: query
    i has its own choice from the tokens j ≤ i, by A_j = Σ_{t≤i} P_tj, so nothing leaks back.

    Args:
        q, k: (B, H, N, D); v: (B, H, N, Dv). One floating dtype, one device.
        heavy, recent: slots for heavy hitters and for the latest tokens; at least one in all.
        causal: token i sees no token j > i.
        is_causal: another name of `causal`.
        block: tokens per step of "streaming".
        scale: of the scores, D^(-1/2) by default.
        key_mask: (B, N) bool, True where a token is real; the others are never attended, credit
            nothing, and do not count as recent. What they hold reaches nobody, not even their own
            outputs: those are of q = 0.
        layout: "bhnd", or "bnhd" where q, k, v and o are (B, N, H, ·): views, nothing is copied.

    Returns:
        o (B, H, N, Dv) in the input's dtype. A query that sees no real token gets 0.

    Raises:
        ValueError: an option out of range, or shapes, dtypes or devices that do not fit.
        TypeError: a tensor as scale, which would lose its gradient.

    Example: each query attends to at most 16 tokens, chosen per head.
        >>> q, k, v = torch.randn(3, 2, 4, 64, 32)  # each (B, H, N, D)
        >>> tab.h2o_attention(q, k, v, heavy=8, recent=8, causal=True, block=1).shape
        torch.Size([2, 4, 64, 32])
    """
    q, k, v = heads_first("h2o_attention", layout, q, k, v)
    q, k, v = check_qkv("h2o_attention", q, k, v, layout=layout)
    causal = check_causal("h2o_attention", causal, is_causal)
    check_key_mask("h2o_attention", key_mask, k)
    heavy = whole("h2o_attention", "heavy", heavy)
    recent = whole("h2o_attention", "recent", recent)
    check_budget(heavy, recent)
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
    block = whole("h2o_attention", "block", block)
    if block < 1:
        raise ValueError(f"block={block}: a block has at least 1 token")
    scale = score_scale("h2o_attention", scale, q.shape[-1])
    q, k, v = real(key_mask, q, k, v)
    operands, stream = (
        (q.detach(), k.detach(), key_mask, heavy, recent, causal),
        mode == "streaming",
    )
    if stream:
        chosen = h2o_choose.apply("auto", *operands, block, scale)
    else:
        chosen = h2o_choose_exact.apply("auto", *operands, scale)
        block = 1 if causal else max(1, q.shape[2])
    o = h2o_attend.apply("auto", q, k, v, chosen, key_mask, stream, causal, block, scale)[0]
    return as_given(layout, o)
