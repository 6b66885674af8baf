"""The cache of H2O, and its policy (Zhang et al. 2023, algorithm 1; formula: tab/ops/h2o.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._check import accumulate, check_key_mask, check_qkv, real, shapes, token_major
from ._options import boolean, finite
from ._softmax import weigh
from .decode_cache import DecodeCache


def check_budget(heavy: int, recent: int) -> None:
    """A ValueError unless there is a slot for at least one token."""
    if heavy < 0 or recent < 0 or heavy + recent < 1:
        raise ValueError(
            f"H2O wants heavy ≥ 0, recent ≥ 0 and at least one slot in all, got heavy={heavy}, "
            f"recent={recent}; the smallest cache is heavy=0, recent=1"
        )


class H2OCache(DecodeCache):
    """The slots that survived, S ≤ heavy + recent of them, the same number for every head.

    k (B, H, S, D); v (B, H, S, Dv); score A (B, H, S) float32, the attention each got so far;
    position (B, H, S) int64, counted in real tokens, -1 for a masked one (it is never attended and
    leaves first). All None before the first token. The memory is the cache's own. Its dtype is that
    of the first tokens; narrower ones, as under autocast, are widened to it.

    Alone of all caches it records gradients. A copy (copy.deepcopy) goes on by itself; they flow
    through it, and through `reorder`, to where the original's do. A graph cannot be pickled: see
    `detach`.

    heavy, recent: slots for heavy hitters and for the latest tokens, at least one in all; scale: of
    the scores, D^(-1/2) unless given. A ValueError or TypeError names what does not fit.

    Example: a prompt of 20 tokens, then one more, in 8 slots a head.
        >>> cache = tab.H2OCache(heavy=4, recent=4)
        >>> q, k, v = torch.randn(3, 1, 2, 21, 16)  # each (B, H, N, D)
        >>> o = cache.prefill(q[:, :, :20], k[:, :, :20], v[:, :, :20])
        >>> o = cache.step(q[:, :, 20:], k[:, :, 20:], v[:, :, 20:])
        >>> o.shape, cache.k.shape
        (torch.Size([1, 2, 1, 16]), torch.Size([1, 2, 8, 16]))
    """

    NAMES = ("k", "v", "score", "position", "seen")

    def __init__(self, *, heavy: int, recent: int, scale: float | None = None):
        check_budget(heavy, recent)
        self.heavy, self.recent = heavy, recent
        self.scale = None if scale is None else finite("H2OCache", "scale", scale)
        self.reset()

    def reset(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.score: Tensor | None = None
        self.position: Tensor | None = None
        self.seen: Tensor | int = 0  # real tokens so far; (B, 1, 1) once a mask was given

    @property
    def length(self) -> int:
        if isinstance(self.seen, int):
            return self.seen
        return int(self.seen.max()) if self.seen.numel() else 0

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (self.k, self.v, self.score, self.position) if x is not None)

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """One decode step: append, attend, credit, evict (Zhang 2023, algorithm 1).

        q, k (B, H, T, D) and v (B, H, T, Dv) of the T next tokens -> o (B, H, T, Dv). With T > 1
        the block attends the cache and itself (causally, or all of itself with causal=False) and
        evicts once, at its end. key_mask (B, T) bool, True where a token is real; the output of
        one that is not is that of q = 0.
        """
        q, k, v = check_qkv("H2OCache.step", q, k, v)
        check_key_mask("H2OCache.step", key_mask, k)
        boolean("H2OCache.step", "causal", causal)
        self._check_next(k, v)
        if key_mask is None and causal and self._full(q, k, v):
            return self._replace(q, k, v)
        q, k, v = real(key_mask, q, k, v)  # what masked tokens hold reaches nobody
        self._append(k, v, key_mask)
        visible = self._visible(q.shape[2], causal)
        p = self._probabilities(q, causal)  # (B, H, T, S)
        o = weigh(p, self._slots()[1].to(p.dtype), visible.expand_as(p))
        self._credit(p, key_mask)
        self._evict()
        return token_major(o.to(v.dtype))

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """A whole prompt: full causal attention, A_j = Σ_i P_ij, then one eviction; O(N²) memory.

        Shapes as in `step`. A long prompt in blocks of T tokens takes O(N·(budget + T)), and keeps
        what `h2o_attention` keeps with block=T: the cache evicts at the end of each.
        """
        return self.step(q, k, v, key_mask=key_mask)

    def detach(self) -> H2OCache:
        """A copy without the graph: pickling, sending to a process and truncated backpropagation
        want one."""
        return self._copy(lambda x: x.detach().clone())

    def __deepcopy__(self, memo: dict) -> H2OCache:
        memo[id(self)] = other = self._copy(Tensor.clone)
        return other

    def _copy(self, each: Callable[[Tensor], Tensor]) -> H2OCache:
        other = object.__new__(type(self))
        for name, x in self.__dict__.items():
            setattr(other, name, each(x) if isinstance(x, Tensor) else x)
        return other

    def __getstate__(self) -> dict:
        if any(isinstance(x, Tensor) and x.requires_grad for x in self.__dict__.values()):
            raise ValueError(
                "this H2OCache records gradients, and a graph cannot be pickled: pickle "
                "cache.detach(), or step under torch.no_grad(); copy.deepcopy keeps the graph"
            )
        return self.__dict__

    def _batch(self) -> int:
        return 0 if self.k is None else len(self.k)

    def _tensors(self) -> dict[str, Tensor]:
        if self.k is None:
            return {}
        seen = self.seen if isinstance(self.seen, Tensor) else self.k.new_full(
            (self.k.shape[0], 1, 1), self.seen, dtype=torch.int64
        )  # fmt: skip
        return dict(zip(self.NAMES, (*self._slots(), seen), strict=True))

    def _sizes(self, length: int) -> dict[str, tuple[int | str, ...]]:
        slots = "B", "H", "S"
        return {"k": (*slots, "D"), "v": (*slots, "Dv"), "score": slots, "position": slots,
                "seen": ("B", 1, 1)}  # fmt: skip

    def _restore(self, tensors: dict[str, Tensor], length: int) -> None:
        self.k, self.v, self.score, self.position, seen = (tensors[name] for name in self.NAMES)
        plain = bool((seen == length).all()) and bool((self.position >= 0).all())
        self.seen = length if plain else seen

    def _slots(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k, v, A and position, once there are any."""
        assert self.k is not None and self.v is not None
        assert self.score is not None and self.position is not None
        return self.k, self.v, self.score, self.position

    # --- a step in place --------------------------------------------------------------------------

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether this is one token for slots that are all taken, and the last word on them: no
        gradient is recorded, and what inference mode made is not written to outside of it."""
        if self.k is None or q.shape[2] != 1 or self.k.shape[2] != self.heavy + self.recent:
            return False
        slots = self._slots()
        if not self.recent or not isinstance(self.seen, int) or self.k.dtype != k.dtype:
            return False
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *slots)):
            return False
        return torch.is_inference_mode_enabled() or not any(x.is_inference() for x in slots)

    def _replace(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The token takes the slot of the one that leaves: nothing is moved."""
        keys, values, score, position = self._slots()
        acc = score.dtype
        q = q.to(acc) * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        own = (q * k.to(acc)).sum(-1, keepdim=True)  # (B, H, 1, 1)
        p = torch.cat([q @ keys.to(acc).mT, own], -1).softmax(-1)
        o = p[..., :-1] @ values.to(acc) + p[..., -1:] * v.to(acc)
        score += p[:, :, 0, :-1]
        self.seen += 1
        late = position >= self.seen - self.recent
        gone = score.masked_fill(late, torch.inf).argmin(-1, keepdim=True)  # (B, H, 1)
        for held, x in ((keys, k), (values, v)):
            held.scatter_(2, gone[..., None].expand_as(x), x)
        score.scatter_(2, gone, p[:, :, 0, -1:])
        position.scatter_(2, gone, self.seen - 1)
        return token_major(o.to(v.dtype))

    # --- the parts of a step ----------------------------------------------------------------------

    def _check_next(self, k: Tensor, v: Tensor) -> None:
        """Whether the cache goes on with these: its sizes, its device, no wider a dtype."""
        if self.k is None:
            return
        held, given = ((*x.shape[:2], x.shape[3], y.shape[3], x.device) for x, y in
                       (self._slots()[:2], (k, v)))  # fmt: skip
        rule = None
        if held != given:
            rule = "the batch, heads, widths and device it holds"
        elif torch.promote_types(k.dtype, self.k.dtype) != self.k.dtype:
            rule = "the dtype it was begun with, or one that widens to it"
        if rule:
            got = shapes(cache_k=self.k, cache_v=self.v, k=k, v=v)
            raise ValueError(f"H2OCache.step wants {rule}; got {got}")

    def _append(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
        b, h, t, _ = k.shape
        if key_mask is None:
            position = self.seen + torch.arange(t, device=k.device)
            self.seen = self.seen + t
        else:
            position = self.seen + key_mask[:, None].cumsum(-1) - 1  # (B, 1, T)
            position = position.masked_fill(~key_mask[:, None], -1)
            self.seen = self.seen + key_mask[:, None].sum(-1, keepdim=True)
        position = position.expand(b, h, t).contiguous()  # a step writes to it
        score = torch.zeros(b, h, t, dtype=accumulate(k), device=k.device)
        if self.k is None:  # copies: the caller may fill his buffer anew
            self.k, self.v, self.score, self.position = k.clone(), v.clone(), score, position
            return
        held = self._slots()
        new = k.to(held[0].dtype), v.to(held[1].dtype), score, position
        self.k, self.v, self.score, self.position = (
            torch.cat(x, 2) for x in zip(held, new, strict=True)
        )

    def _probabilities(self, q: Tensor, causal: bool) -> Tensor:
        """softmax over the slots, in float32; a query that sees nothing gets zeros."""
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        k, _, score, _ = self._slots()
        acc = score.dtype
        scores = q.to(acc) @ k.to(acc).mT * scale  # (B, H, T, S)
        visible = self._visible(q.shape[2], causal)
        # Not -inf: the softmax of a row of nothing but -inf is NaN, and so is its gradient.
        p = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
        return p.masked_fill(~visible, 0.0)

    def _visible(self, t: int, causal: bool) -> Tensor:
        """What the t latest tokens see of the slots, (B, H, 1 or t, S)."""
        k, _, _, position = self._slots()
        visible = position[:, :, None] >= 0
        if causal:
            slot = torch.arange(k.shape[2], device=k.device)
            visible = visible & (slot <= slot[len(slot) - t :, None])  # own block: not later ones
        return visible

    def _credit(self, p: Tensor, key_mask: Tensor | None) -> None:
        p = p.detach()
        if key_mask is not None:  # what padding attends to counts for nothing
            p = p.masked_fill(~key_mask[:, None, :, None], 0.0)
        self.score = self._slots()[2] + p.sum(2)

    def _evict(self) -> None:
        budget, (k, v, score, position) = self.heavy + self.recent, self._slots()
        if k.shape[2] <= budget:
            return
        priority = score.masked_fill(position >= self.seen - self.recent, torch.inf)
        priority = priority.masked_fill(position < 0, -torch.inf)
        kept = priority.topk(budget, -1).indices  # (B, H, budget)
        self.k = k.gather(2, kept[..., None].expand(-1, -1, -1, k.shape[3]))
        self.v = v.gather(2, kept[..., None].expand(-1, -1, -1, v.shape[3]))
        self.score, self.position = score.gather(2, kept), position.gather(2, kept)
