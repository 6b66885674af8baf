"""FAVOR+: the state (S, z, c), whatever the number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .._op import Backend
from .._options import check_eps
from ..decode_cache import ordinary
from ..performer import KERNELS, Kernel, performer_attention
from ..performer_reference import exponents
from ._held import Held
from ._state import add_token, by_head, read


class PerformerCache(Held):
    """Causal `performer_attention` in M random features, `o_i = φ(q_i)ᵀS_i / (φ(q_i)ᵀz_i + eps)`.
    It holds the state S, z and its shift c, M·(Dv + 2) numbers a head in float32 (float64 of
    float64), however many tokens there were.

    Args:
        projection: (M, D) in that type, as in `performer_attention`: the model's, and no part of
            `state_dict()`.
        kernel, eps: as in `performer_attention`; backend: of `prefill`, as there.

    Raises:
        ValueError: another kernel, a projection that does not fit, or tokens that do not fit those
            before; the message prints them.
        RuntimeError: gradients would be recorded, which no cache but H2OCache does.

    Example: 100 tokens, one by one.
        >>> q, k, v = torch.randn(3, 1, 2, 100, 16)  # each (B, H, N, D)
        >>> w = tab.orthogonal_projection(64, 16)
        >>> cache = tab.PerformerCache(w)
        >>> o = [cache.step(q[:, :, [i]], k[:, :, [i]], v[:, :, [i]]) for i in range(100)]
        >>> whole = tab.performer_attention(q, k, v, w, causal=True)
        >>> torch.allclose(torch.cat(o, 2), whole, atol=1e-4), cache.bytes == 2 * 64 * 18 * 4
        (True, True)
    """

    NAMES = ("S", "z", "c")
    STATE = True
    FUNCTION = "tab.performer_attention with initial_state and return_state"

    def __init__(
        self,
        projection: Tensor,
        *,
        kernel: Kernel = "softmax",
        eps: float = 0.0,
        backend: Backend = "auto",
    ):
        super().__init__()
        if kernel not in KERNELS:
            raise ValueError(
                f"PerformerCache: kernel={kernel!r}: choose one of {', '.join(KERNELS)}"
            )
        if projection.requires_grad:
            raise ValueError("projection is a constant; pass projection.detach()")
        self.projection, self.kernel, self.backend = projection, kernel, backend
        self.eps = check_eps("PerformerCache", eps)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        if self._held and q.shape[2] == 1:
            self._length += 1
            return self._one(by_head(q, k), k, v).to(v.dtype)
        held = self._held
        state = (held["S"], held["z"], held["c"]) if held else None
        with ordinary(), torch.no_grad():
            o, after = performer_attention(
                q, k, v, self.projection, kernel=self.kernel, eps=self.eps, causal=True,
                initial_state=state, return_state=True, backend=self.backend,
            )  # fmt: skip
        self._held = dict(zip(self.NAMES, after, strict=True))
        self._length += q.shape[2]  # not before: what raises has added nothing
        return o

    def _one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s, z, c = self._held.values()
        b, a = exponents(q, k, self.projection, None, KERNELS[self.kernel])
        if self.kernel == "relu":
            fq, fk = b.relu_(), a.relu_()
        else:
            top = torch.maximum(c, a[:, :, 0])
            old = c.sub_(top).exp_()  # in the place of c, which is over
            s.mul_(old[..., None])
            z.mul_(old)
            c.copy_(top)
            fk = a.sub_(top[:, :, None]).exp_()
            b.add_(top[:, :, None])
            fq = b.sub_(b.amax(-1, keepdim=True)).exp_()
        add_token(s, z, fk, v.to(s.dtype))
        return read(fq, s, z, self.eps)

    def _sizes(self, length: int) -> dict[str, tuple[int | str, ...]]:
        m = self.projection.shape[0]
        return {"S": ("B", "H", m, "Dv"), "z": ("B", "H", m), "c": ("B", "H", m)}
