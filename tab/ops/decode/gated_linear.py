"""Gated linear attention: the state S, which decays, whatever the number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import shapes
from .._options import boolean, finite
from .._softmax import score_scale
from ..decode_cache import ordinary
from ..gated_linear import gated_linear_attention
from ._held import Held
from ._state import add_token, by_head, read


class GatedLinearCache(Held):
    """`gated_linear_attention`, `S_t = Diag(e^(g_t)) S_{t-1} + k_t v_tᵀ`, `o_t = scale·S_tᵀq_t`. It
    holds the state S, D·Dv numbers a head in float32 (float64 of float64), and where `normalize` is
    True also z, D numbers, however many tokens there were.

    prefill(q, k, v, log_decay) -> o (B, H, N, Dv), and step of one token, N = 1; log_decay (H_kv,),
    (B, H_kv, N) or (B, H_kv, N, D), as in `gated_linear_attention`.

    Args:
        scale, normalize: as in `gated_linear_attention`.

    Raises:
        ValueError: tokens or decays that do not fit, or do not go on with those before.
        RuntimeError: gradients would be recorded, which no cache but H2OCache does.

    Example: retention, a prompt and a token more.
        >>> q, k, v = torch.randn(3, 1, 4, 65, 32)  # each (B, H, N, D)
        >>> decay = torch.log(1 - 2.0 ** (-5 - torch.arange(4)))
        >>> cache = tab.GatedLinearCache()
        >>> o = cache.prefill(q[:, :, :64], k[:, :, :64], v[:, :, :64], decay)
        >>> o = cache.step(q[:, :, 64:], k[:, :, 64:], v[:, :, 64:], decay)
        >>> whole = tab.gated_linear_attention(q, k, v, decay)
        >>> torch.allclose(o, whole[:, :, 64:], atol=1e-4), cache.bytes == 4 * 32 * 32 * 4
        (True, True)
    """

    STATE = True
    FUNCTION = "tab.gated_linear_attention with initial_state and return_state"

    def __init__(self, *, scale: float | None = None, normalize: bool = False):
        super().__init__()
        self.NAMES = ("S", "z") if normalize else ("S",)
        self.normalize = boolean("GatedLinearCache", "normalize", normalize)
        self.scale = None if scale is None else finite("GatedLinearCache", "scale", scale)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:  # type: ignore[override]
        """q (B, H, N, D), k (B, H_kv, N, D), v (B, H_kv, N, Dv) and log_decay of the next tokens
        -> o (B, H, N, Dv); any N, as often as one likes."""
        return self._next("prefill", q, k, v, log_decay)

    def step(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:  # type: ignore[override]
        """The same of one token of each sequence, N = 1."""
        return self._step(q, k, v, log_decay)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        (log_decay,) = more
        scale = score_scale("GatedLinearCache", self.scale, q.shape[3])
        if self._held and q.shape[2] == 1:
            o = self._one(by_head(q, k), k, v, log_decay, scale).to(v.dtype)
        else:
            s, z = self._held.get("S"), self._held.get("z")
            state = s if z is None or s is None else (s, z)
            with ordinary(), torch.no_grad():
                o, after = gated_linear_attention(
                    q, k, v, log_decay, scale=scale, normalize=self.normalize,
                    initial_state=state, return_state=True,
                )  # fmt: skip
            tensors = (after,) if isinstance(after, Tensor) else after
            held = zip(self.NAMES, tensors, strict=True)
            self._held = {name: x.contiguous() for name, x in held}
        self._length += q.shape[2]
        return o

    def _one(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float) -> Tensor:
        s, z = self._held["S"], self._held.get("z")
        q, k, v = (x.to(s.dtype) for x in (q, k, v))
        kept = log_decay.to(s.dtype).exp()
        if kept.dim() == 1:
            kept = kept[:, None]  # (H_kv, 1)
        elif kept.dim() == 4:
            kept = kept[:, :, 0]  # (B, H_kv, D); else (B, H_kv, 1) already
        s.mul_(kept[..., None])
        if z is None:
            s.addcmul_(k.mT, v)
            o = (q * scale) @ s
            return o.reshape(o.shape[0], o.shape[1] * o.shape[2], 1, o.shape[3])
        z.mul_(kept)
        add_token(s, z, k, v)
        return read(q, s, z, 0.0)

    def _check_more(self, k: Tensor, *more: Tensor) -> None:
        ((b, h, n, d), (g,)) = k.shape, more
        fits = tuple(g.shape) in ((h,), (b, h, n), (b, h, n, d)) and g.is_floating_point()
        if not fits or g.device != k.device:
            raise ValueError(
                f"GatedLinearCache wants log_decay {(h,)}, {(b, h, n)} or {(b, h, n, d)}, "
                f"floating, on the device of k; got {shapes(log_decay=g, k=k)}"
            )

    def _sizes(self, length: int) -> dict[str, tuple[int | str, ...]]:
        sizes: dict[str, tuple[int | str, ...]] = {"S": ("B", "H", "D", "Dv"), "z": ("B", "H", "D")}
        return {name: sizes[name] for name in self.NAMES}
