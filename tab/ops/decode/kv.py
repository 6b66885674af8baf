"""Keys and values of all tokens: what softmax attention has to keep, and every other saves."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .._check import token_major
from .._options import finite
from .._sdpa import once
from .._softmax import score_scale
from ..decode_cache import ordinary
from ._held import Held
from ._softmax import attend_last, attend_one

LEAST = 64  # rows that are reserved at first


class KVCache(Held):
    """Softmax attention, `o_i = Σ_{j≤i} softmax_j(scale·q_i·k_j) v_j`, in PyTorch: the control for
    the other caches. It holds k and v of every token, (D + Dv) numbers a token and
    head, in rows that double as they fill.

    Args:
        capacity: tokens that there is room for from the first one on.
        scale: of the scores, 1/√D unless given.

    Raises:
        ValueError: tokens that do not fit those before; the message prints both.
        RuntimeError: gradients would be recorded, which no cache but H2OCache does.

    Example: a prompt of 20 tokens and one more, with four heads of q for two of k and v.
        >>> cache = tab.KVCache(capacity=32)
        >>> q, k, v = torch.randn(1, 4, 21, 16), *torch.randn(2, 1, 2, 21, 16)
        >>> o = cache.prefill(q[:, :, :20], k[:, :, :20], v[:, :, :20])
        >>> o = cache.step(q[:, :, 20:], k[:, :, 20:], v[:, :, 20:])
        >>> o.shape, cache.length, cache.bytes  # 32 rows of k and v, 2 heads, 16 numbers
        (torch.Size([1, 4, 1, 16]), 21, 8192)
    """

    NAMES = ("k", "v")
    FUNCTION = "torch.nn.functional.scaled_dot_product_attention"

    def __init__(self, *, capacity: int = 0, scale: float | None = None):
        super().__init__()
        if capacity < 0:
            raise ValueError(f"KVCache wants capacity ≥ 0, got {capacity}")
        self.capacity = capacity
        self.scale = None if scale is None else finite("KVCache", "scale", scale)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        n, before, scale = q.shape[2], self._length, score_scale("KVCache", self.scale, q.shape[3])
        keys, values = self._room(k, v, before + n)
        keys[:, :, before : before + n] = k
        values[:, :, before : before + n] = v
        self._length += n
        keys, values = (x[:, :, : self._length] for x in (keys, values))
        if n == 1:
            return attend_one(q, keys, values, scale)
        if before == 0 and k.shape[1] == q.shape[1]:
            return token_major(once(q, k, v, scale, causal=True))
        return attend_last(q, keys, values, scale, None)

    def _room(self, k: Tensor, v: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Buffers of k and v with rows for that many tokens."""
        rows = self._held["k"].shape[2] if self._held else 0
        if tokens > rows or not self._held:
            with ordinary():
                more = max(tokens, 2 * rows, self.capacity or LEAST) - rows
                held = self._held or {"k": k.new_empty(_none(k)), "v": v.new_empty(_none(v))}
                self._held = {name: F.pad(x, (0, 0, 0, more)) for name, x in held.items()}
        return self._held["k"], self._held["v"]

    def _tensors(self) -> dict[str, Tensor]:
        return {name: x[:, :, : self._length] for name, x in self._held.items()}

    def _sizes(self, length: int) -> dict[str, tuple[int | str, ...]]:
        return {"k": ("B", "H", length, "D"), "v": ("B", "H", length, "Dv")}

    def _restore(self, tensors: dict[str, Tensor], length: int) -> None:
        super()._restore({}, length)
        self._room(tensors["k"], tensors["v"], length)
        for name, x in tensors.items():
            self._held[name][:, :, :length] = x


def _none(x: Tensor) -> tuple[int, ...]:
    """The sizes of x (B, H, N, D) without tokens."""
    return (*x.shape[:2], 0, x.shape[3])
