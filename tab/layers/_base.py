"""What a layer is: (B, N, C) in, (B, N, C) out, and its attention matrix on request."""

from __future__ import annotations

from torch import Tensor, nn

from .rope import Rope


class Attention(nn.Module):
    """Base of every layer. Subclasses take (dim, *, seq_len, grid=None, **own options).

    fine_size: the name of an option, a whole number ≥ 1, with which the layer grows in finer steps
    than with `dim`; recipes that match sizes choose it (tab/match.py).
    """

    fine_size: str = ""

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """x (B, N, C), key_mask (B, N) bool, True where a token is real -> (B, N, C)."""
        raise NotImplementedError

    def attention_matrix(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> the weight of token j in output i, (B, H, N, N); rows sum to 1.

        Computed explicitly from the layer's own weights, whatever kernel `forward` runs: for
        pictures and tests, not for training.
        """
        raise NotImplementedError(f"{type(self).__name__} has no attention matrix")

    def after_step(self) -> None:
        """Called after each optimizer step (router balance, QK-Clip). Most layers need nothing."""

    def auxiliary_loss(self) -> Tensor | None:
        """A term to add to the loss of the latest forward, or None."""
        return None


class HeadsAttention(Attention):
    """Q, K, V projections, `attend` on (B, H, N, D), output projection; D = C/H.

    Subclasses write `attend(q, k, v, key_mask)` and `weights(q, k)`.
    rope: rotate q and k by position, in two dimensions when a grid is given (Su et al. 2021).
    """

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        num_heads: int = 4,
        rope: bool = False,
        output: bool = True,
    ):
        super().__init__()
        check_heads(type(self).__name__, dim, num_heads)
        self.dim, self.num_heads, self.seq_len, self.grid = dim, num_heads, seq_len, grid
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim) if output else nn.Identity()
        self.rope = Rope(dim // num_heads, seq_len, grid=grid) if rope else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """q, k, v (B, H, N, D) -> (B, H, N, D)"""
        raise NotImplementedError

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """q, k (B, H, N, D) -> (B, H, N, N)"""
        raise NotImplementedError

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, C) -> q, k, v (B, H, N, D), q and k rotated if the layer has positions."""
        q, k, v = (
            self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        )
        return (q, k, v) if self.rope is None else (self.rope(q), self.rope(k), v)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        y = self.attend(*self.project(x), key_mask)  # (B, H, N, D)
        return self.out(y.transpose(1, 2).flatten(2))

    def attention_matrix(self, x: Tensor) -> Tensor:
        q, k, _ = self.project(x)
        return self.weights(q.float(), k.float())


def check_heads(layer: str, dim: int, num_heads: int) -> None:
    """The width must split evenly into heads; the error names the nearest numbers that do it."""
    if num_heads < 1 or dim % num_heads:
        divisors = [h for h in range(1, dim + 1) if dim % h == 0]
        near = sorted(divisors, key=lambda h: abs(h - num_heads))[:3]
        raise ValueError(
            f"{layer}: num_heads={num_heads} does not divide dim={dim}; "
            f"nearest choices: {', '.join(map(str, sorted(near)))}"
        )
