"""Local attention: a ring of the last keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from .._options import finite
from .._softmax import score_scale
from ..decode_cache import ordinary
from ..local import local_attention
from ._held import Held
from ._softmax import attend_last, attend_one


class LocalCache(Held):
    """Causal `local_attention`, `o_i = Σ_j softmax_j(scale·q_i·k_j) v_j` over i − window ≤ j ≤ i.
    It holds k and v of window + 1 tokens, reserved at the first one: token i lies in row
    i mod (window + 1), in the place of the one that no later query sees.

    Args:
        window: tokens before its own that a query sees, as in `local_attention`.
        scale: of the scores, 1/√D unless given.

    Raises:
        ValueError: window < 0, or tokens that do not fit those before; the message prints them.
        RuntimeError: gradients would be recorded, which no cache but H2OCache does.

    Example: 100 tokens, one by one, in a window of 16.
        >>> q, k, v = torch.randn(3, 1, 2, 100, 32)  # each (B, H, N, D)
        >>> cache = tab.LocalCache(window=16)
        >>> o = [cache.step(q[:, :, [i]], k[:, :, [i]], v[:, :, [i]]) for i in range(100)]
        >>> whole = tab.local_attention(q, k, v, window=16, causal=True)
        >>> torch.allclose(torch.cat(o, 2), whole, atol=1e-5), cache.bytes == 17 * 2 * 2 * 32 * 4
        (True, True)
    """

    NAMES = ("k", "v")
    FUNCTION = "tab.local_attention"

    def __init__(self, *, window: int, scale: float | None = None):
        super().__init__()
        if window < 0:
            raise ValueError(f"LocalCache wants window ≥ 0, tokens before the own; got {window!r}")
        self.window = window
        self.scale = None if scale is None else finite("LocalCache", "scale", scale)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        n, scale = q.shape[2], score_scale("LocalCache", self.scale, q.shape[3])
        self._begin(k, v)
        keys, values = self._held.values()
        if n == 1:
            row = self._length % (self.window + 1)
            keys[:, :, row], values[:, :, row] = k[:, :, 0], v[:, :, 0]
            self._length += 1
            used = min(self._length, self.window + 1)
            return attend_one(q, keys[:, :, :used], values[:, :, :used], scale)
        past = min(self._length, self.window)
        rows = self._rows(self._length - past, self._length)
        o = _attend_more(q, _after(keys, rows, k), _after(values, rows, v), scale, self.window)
        self._length += n
        last = min(n, self.window + 1)
        rows = self._rows(self._length - last, self._length)
        keys[:, :, rows], values[:, :, rows] = k[:, :, n - last :], v[:, :, n - last :]
        return o

    def _begin(self, k: Tensor, v: Tensor) -> None:
        if not self._held:
            with ordinary():
                self._held = {
                    name: x.new_zeros(*x.shape[:2], self.window + 1, x.shape[3])
                    for name, x in (("k", k), ("v", v))
                }

    def _rows(self, first: int, last: int) -> Tensor:
        """Where the tokens first … last − 1 lie."""
        device = self._held["k"].device
        return torch.arange(first, last, device=device) % (self.window + 1)

    def _tensors(self) -> dict[str, Tensor]:
        """In the order of the tokens."""
        if not self._held:
            return {}
        rows = self._rows(max(0, self._length - self.window - 1), self._length)
        return {name: x[:, :, rows] for name, x in self._held.items()}

    def _sizes(self, length: int) -> dict[str, tuple[int | str, ...]]:
        held = min(length, self.window + 1)
        return {"k": ("B", "H", held, "D"), "v": ("B", "H", held, "Dv")}

    def _restore(self, tensors: dict[str, Tensor], length: int) -> None:
        super()._restore({}, length)
        self._begin(tensors["k"], tensors["v"])
        rows = self._rows(length - tensors["k"].shape[2], length)
        for name, x in tensors.items():
            self._held[name][:, :, rows] = x


def _after(held: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """The tokens in these rows, and the new ones behind them."""
    return torch.cat([held[:, :, rows], new], 2) if len(rows) else new


def _attend_more(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """q (B, H, N, D) of the last N tokens of k (B, H_kv, P + N, D). The operator wants as many
    queries as keys: it takes P idle ones in front where they are fewer than the real ones."""
    past = k.shape[2] - q.shape[2]
    if past > q.shape[2]:
        return attend_last(q, k, v, scale, window)
    if past:
        q = torch.nn.functional.pad(q, (0, 0, past, 0))
    return local_attention(q, k, v, window=window, causal=True, scale=scale)[:, :, past:]
