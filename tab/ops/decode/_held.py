"""Caches of q, k and v that hold a few tensors and record no gradients."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .._check import accumulate, check_qkv, shapes
from ..decode_cache import DecodeCache, keeps_no_graph


class Held(DecodeCache):
    """A subclass says what `_attend` does with tokens that fit what is held, and sets `_held`."""

    STATE: ClassVar[bool] = False  # in the accumulation type of the tokens, and not in their own
    FUNCTION: ClassVar[str]  # which computes the same for a whole sequence

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._length = 0
        self._fits: tuple = ()  # what a token is like that was found to go on: checked once

    @property
    def length(self) -> int:
        return self._length

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in self._held.values())

    def reset(self) -> None:
        self._held, self._length, self._fits = {}, 0, ()

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, N, D), k (B, H_kv, N, D) and v (B, H_kv, N, Dv) of the next tokens
        -> o (B, H, N, Dv); any N, as often as one likes."""
        return self._next("prefill", q, k, v)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same of one token of each sequence, N = 1."""
        return self._step(q, k, v)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        given = _kind(q, k, v, *more)
        if given == self._fits and not torch._C._is_any_autocast_enabled():
            keeps_no_graph(f"{type(self).__name__}.step", self.FUNCTION, q, k, v, *more)
            return self._attend(q, k, v, *more)
        o = self._next("step", q, k, v, *more)
        self._fits = given
        return o

    def _next(self, method: str, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        where = f"{type(self).__name__}.{method}"
        q, k, v = check_qkv(where, q, k, v, grouped=True)
        if method == "step" and q.shape[2] != 1:
            raise ValueError(
                f"{where} wants one token of each sequence, N = 1; prefill takes any number; got "
                + shapes(q=q, k=k, v=v)
            )
        if self._held:
            self._check_fit(where, q, k, v)
        self._check_more(k, *more)
        keeps_no_graph(where, self.FUNCTION, q, k, v, *more)
        if q.shape[2] == 0:
            return q.new_zeros(*q.shape[:3], v.shape[3])
        return self._attend(q, k, v, *more)

    def _check_more(self, k: Tensor, *more: Tensor) -> None:
        """What a token has beside q, k and v: nothing."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        raise NotImplementedError

    def _check_fit(self, where: str, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Whether the tokens go on with what is held."""
        dtype = accumulate(k) if self.STATE else k.dtype
        given = {"B": k.shape[0], "H": k.shape[1], "D": q.shape[3], "Dv": v.shape[3]}
        for name, sizes in self._sizes(self._length).items():
            x = self._held[name]
            fits = all(given.get(str(s), n) == n for s, n in zip(sizes, x.shape, strict=True))
            if not fits or x.device != k.device or x.dtype != dtype:
                raise ValueError(
                    f"{where} wants the batch, heads, widths, dtype and device that it was begun "
                    f"with, or reset(); it holds {shapes(**self._held)} and got "
                    + shapes(q=q, k=k, v=v)
                )

    def _batch(self) -> int:
        return next((len(x) for x in self._held.values()), 0)

    def _tensors(self) -> dict[str, Tensor]:
        return self._held

    def _restore(self, tensors: dict[str, Tensor], length: int) -> None:
        self._held, self._length, self._fits = tensors, length, ()


def _kind(*tensors: Tensor) -> tuple:
    """All that the checks look at, but for autocast and gradients."""
    return tuple([(x.shape, x.dtype, x.device) for x in tensors])
