"""Linear attention: the state (S, z), whatever the number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .._op import Backend
from .._options import check_eps
from ..decode_cache import ordinary
from ..linear import FEATURE_MAPS, FeatureMap, linear_attention
from ..linear_reference import feature
from ._held import Held
from ._state import add_token, by_head, read


class LinearCache(Held):
    """Causal `linear_attention`, `o_i = φ(q_i)ᵀS_i / (φ(q_i)ᵀz_i + eps)`. It holds the state
    S_i = Σ_{j≤i} φ(k_j) v_jᵀ and z_i = Σ_{j≤i} φ(k_j), D·(Dv + 1) numbers a head in float32
    (float64 of float64), however many tokens there were.

    Args:
        feature_map, eps: as in `linear_attention`; "softmax" has no causal form.
        backend: of `prefill`, as in `linear_attention`.

    Raises:
        ValueError: another feature map, or tokens that do not fit those before.
        RuntimeError: gradients would be recorded, which no cache but H2OCache does.

    Example: a prompt in two chunks, then one token more.
        >>> q, k, v = torch.randn(3, 1, 2, 101, 32)  # each (B, H, N, D)
        >>> cache = tab.LinearCache()
        >>> for now in (slice(0, 64), slice(64, 100)):
        ...     o = cache.prefill(q[:, :, now], k[:, :, now], v[:, :, now])
        >>> o = cache.step(q[:, :, 100:], k[:, :, 100:], v[:, :, 100:])
        >>> whole = tab.linear_attention(q, k, v, causal=True)
        >>> torch.allclose(o, whole[:, :, 100:], atol=1e-5), cache.bytes == 2 * 32 * 33 * 4
        (True, True)
    """

    NAMES = ("S", "z")
    STATE = True
    FUNCTION = "tab.linear_attention with initial_state and return_state"

    def __init__(
        self, *, feature_map: FeatureMap = "elu1", eps: float = 0.0, backend: Backend = "auto"
    ):
        super().__init__()
        if feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"LinearCache: feature_map={feature_map!r}: choose one of {', '.join(FEATURE_MAPS)}"
            )
        self.feature_map, self.backend = feature_map, backend
        self.eps = check_eps("LinearCache", eps)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        if self._held and q.shape[2] == 1:
            self._length += 1
            (s, z), phi = self._held.values(), FEATURE_MAPS[self.feature_map]
            fq, fk = (feature(x.to(s.dtype), phi) for x in (by_head(q, k), k))
            add_token(s, z, fk, v.to(s.dtype))
            return read(fq, s, z, self.eps).to(v.dtype)
        state = (self._held["S"], self._held["z"]) if self._held else None
        with ordinary(), torch.no_grad():
            o, after = linear_attention(
                q, k, v, feature_map=self.feature_map, eps=self.eps, causal=True,
                initial_state=state, return_state=True, backend=self.backend,
            )  # fmt: skip
        self._held = dict(zip(self.NAMES, after, strict=True))
        self._length += q.shape[2]  # not before: what raises has added nothing
        return o

    def _sizes(self, length: int) -> dict[str, tuple[int | str, ...]]:
        return {"S": ("B", "H", "D", "Dv"), "z": ("B", "H", "D")}
