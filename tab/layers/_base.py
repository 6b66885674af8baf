"""What a layer is: (B, N, C) in, (B, N, C) out, and its attention matrix on request."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import FunctionType, MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._check import accumulate, shapes
from ._repr import Shown
from ._sizes import built, check_heads
from .rope import Rope

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


NOT_SAID = "its class does not say how it runs for several seeds at once (tab/layers/_stacking.py)"


class Attention(Shown):
    """Base of every layer. Subclasses take (dim, *, seq_len, grid=None, **own options), as this
    one does, which keeps none of them, and write `compute`; one that writes `forward` instead has
    to keep the rule for masks itself.

    dim: C, the width of the tokens. seq_len: the most tokens N it will meet. grid: (rows, cols)
    where the tokens are the cells of an image. In the examples of the layers x is (2, 64, 32).

    The rule: a masked token takes part in nothing; what x holds there, NaN included, reaches no
    other output and no gradient, and the output there is 0. So nothing of a batch entry whose
    tokens are all masked is left, and an empty batch (B = 0 or N = 0) gives an empty output.

    title: its name in tables and pictures; the name that it is registered under, if empty.
    colour: its place in the palette of the pictures (tab/report/style.py), 0 to 20; None: the next
    that no layer claims.
    stacking: how it runs for several seeds at once: True, its stacked form, or why it cannot
    (tab/layers/_stacking.py). These three are a class's own: a subclass does not inherit them.
    is_attention: False for a control (tab/layers/controls.py): no token weighs the others by what
    they hold. The statistics compare attentions with the best of these too.
    mixes_tokens: False where no output depends on another token's input.
    fine_size: the name of an option, a whole number ≥ 1, with which the layer grows in finer steps
    than with `dim`; recipes that match widths choose it (tab/recipe/size_matching.py).
    size_options: names of options, whole numbers ≥ 1, with which it grows while `dim` stays;
    recipes that match blocks choose one of them (`size_option`).
    reads_stream: `forward` takes the residual stream too, beside x, which is its norm.
    takes_mask: False where a key mask is an error.
    before: options whose default has changed since results were kept, with what it was: a run or a
    recipe that does not say means this.

    >>> class Mean(tab.layers.Attention):
    ...     def compute(self, x, key_mask):
    ...         real = 1.0 if key_mask is None else key_mask[..., None]
    ...         return (x * real).sum(1, keepdim=True).expand_as(x)
    >>> mask = torch.arange(64) < torch.tensor([[64], [9]])
    >>> Mean()(x, mask)[1, 9:].any()  # masked tokens
    tensor(False)
    """

    title: str = ""
    colour: int | None = None
    stacking: bool | str | type[nn.Module] = NOT_SAID
    is_attention: bool = True
    mixes_tokens: bool = True
    _width: int | None = None  # C, where the layer knows it
    fine_size: str = ""
    size_options: tuple[str, ...] = ()
    reads_stream: bool = False
    takes_mask: bool = True
    before: Mapping[str, object] = MappingProxyType({})

    @classmethod
    def size_option(cls, options: Mapping[str, object]) -> str:
        """Which of the size options a layer built with these options grows in; "" if none."""
        return next(iter(cls.size_options), cls.fine_size)

    @built
    def __init__(
        self,
        dim: int | None = None,
        *,
        seq_len: int | None = None,
        grid: tuple[int, int] | None = None,
    ):
        super().__init__()

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        for name in ("title", "colour", "stacking"):
            if name not in vars(cls):
                setattr(cls, name, vars(Attention)[name])
        if "__init__" in vars(cls):
            cls.__init__ = built(cls.__init__)
        # torch.compile allows eight compilations to a code object: each layer gets one of its own.
        if "forward" not in vars(cls):
            f = cls.forward
            code, rest = f.__code__.replace(), (f.__name__, f.__defaults__, f.__closure__)
            cls.forward = functools.update_wrapper(FunctionType(code, f.__globals__, *rest), f)
            cls.forward.__kwdefaults__ = f.__kwdefaults__

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, stream: Tensor | None = None
    ) -> Tensor:
        """x (B, N, C), key_mask (B, N) bool on x's device, True where a token is real ->
        (B, N, C). stream (B, N, C): only where the layer `reads_stream`, x itself if None.

        Raises ValueError: x is not (B, N, C), or the mask is anything else, or `compute` gives
        another shape than x's; it names what was given.
        """
        self._check(x, key_mask)
        inputs: tuple[Tensor, ...] = (x,) if stream is None else (x, stream)
        (b, n), empty = x.shape[:2], 0 in x.shape[:2]
        if empty:  # masked tokens stand in, cut off below: every parameter gets its gradient, 0
            pad = (0, 0, 0, 0 if n else getattr(self, "seq_len", 1), 0, 0 if b else 1)
            inputs = tuple(F.pad(t, pad) for t in inputs)
            if self.takes_mask:
                key_mask = torch.zeros(inputs[0].shape[:2], dtype=torch.bool, device=x.device)
        if key_mask is not None:
            hidden = ~key_mask[..., None]  # (B, N, 1)
            inputs = tuple(t.masked_fill(hidden, 0.0) for t in inputs)
        y = self.compute(inputs[0], key_mask, *inputs[1:])
        # Another shape might broadcast, in silence, where the output is added to x.
        if not torch.compiler.is_compiling() and (
            not isinstance(y, Tensor) or y.shape != inputs[0].shape
        ):
            got = shapes(y=y) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"{type(self).__name__}.compute has to return (B, N, C), as x is: got {got} for "
                f"{shapes(x=inputs[0])}"
            )
        if key_mask is not None:
            y = y.masked_fill(hidden, 0.0)
        return y[:b, :n] if empty else y

    def compute(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """x (B, N, C), 0 where key_mask (B, N) hides a token -> (B, N, C), of any value there."""
        raise NotImplementedError

    def attention_matrix(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> the weight of token j in output i, (B, H, N, N); rows sum to 1.

        Computed explicitly from the layer's own weights, whatever kernel `forward` runs: for
        pictures and tests, not for training.
        """
        raise NotImplementedError(f"{type(self).__name__} has no attention matrix")

    def after_step(self, group: ProcessGroup | None = None) -> None:
        """Called after each optimizer step (router balance, QK-Clip). Most layers need nothing.

        Under DDP or FSDP2 every rank calls after_step(): what the ranks of `group` (by default all)
        saw is put together, so that their layers stay the same.
        """

    def auxiliary_loss(self) -> Tensor | None:
        """A term to add to the loss of the latest forward, or None."""
        return None

    def statistics(self) -> list[Tensor]:
        """What was counted since the last step; not among the buffers (tab/layers/_state.py)."""
        return []

    def _check(self, x: Tensor, key_mask: Tensor | None) -> None:
        name = type(self).__name__
        if x.dim() != 3 or self._width not in (None, x.shape[2]):
            width = "C" if self._width is None else self._width
            raise ValueError(f"{name} wants x (B, N, {width}), got {shapes(x=x)}")
        if key_mask is None:
            return
        if not self.takes_mask:
            raise ValueError(f"{name} takes no key_mask: the study had no padding")
        wanted = f"{name} wants key_mask {tuple(x.shape[:2])} bool, True where a token is real, "
        if not isinstance(key_mask, Tensor):
            raise ValueError(f"{wanted}got {type(key_mask).__name__}")
        if key_mask.dtype != torch.bool or key_mask.shape != x.shape[:2]:
            raise ValueError(f"{wanted}got {shapes(key_mask=key_mask)} for {shapes(x=x)}")
        if key_mask.device != x.device:
            raise ValueError(f"{wanted}on x's device, got {shapes(key_mask=key_mask, x=x)}")


class HeadsAttention(Attention):
    """Q, K, V projections, `attend` on (B, H, N, D), output projection; D = inner_dim/H.

    Subclasses write `attend(q, k, v, key_mask)` and `weights(q, k)`.
    inner_dim: the width of each of Q, K and V, all heads together; `dim` if None.
    rope: rotate q and k by position, in two dimensions when a grid is given (Su et al. 2021).

    >>> class Mine(tab.layers.HeadsAttention):
    ...     def attend(self, q, k, v, key_mask):
    ...         return tab.linear_attention(q, k, v, key_mask=key_mask)
    >>> Mine(32, seq_len=64, num_heads=4)(x).shape
    torch.Size([2, 64, 32])
    """

    size_options: tuple[str, ...] = ("inner_dim",)

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        num_heads: int = 4,
        rope: bool = False,
        output: bool = True,
        inner_dim: int | None = None,
    ):
        super().__init__()
        what, inner = ("dim", dim) if inner_dim is None else ("inner_dim", inner_dim)
        check_heads(type(self).__name__, inner, num_heads, what)
        self._width = dim
        self.dim, self.num_heads, self.seq_len, self.grid = dim, num_heads, seq_len, grid
        self.inner_dim, self.head_dim = inner, inner // num_heads
        self.widths = (inner, inner, inner if output else dim)  # of Q, K, V: the rows of `qkv`
        self.qkv = nn.Linear(dim, sum(self.widths), bias=False)
        self.out = nn.Linear(inner, dim) if output else nn.Identity()
        self.rope = Rope(self.head_dim, seq_len, grid=grid) if rope else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """q, k, v (B, H, N, D) -> (B, H, N, D)"""
        raise NotImplementedError

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """q, k (B, H, N, D) -> (B, H, N, N)"""
        raise NotImplementedError

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, C) -> q, k, v (B, H, N, D), q and k rotated if the layer has positions."""
        parts = self.qkv(x).split(self.widths, -1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in parts)
        return (q, k, v) if self.rope is None else (self.rope(q), self.rope(k), v)

    def compute(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        y = self.attend(*self.project(x), key_mask)  # (B, H, N, D)
        return self.out(y.transpose(1, 2).flatten(2))

    def attention_matrix(self, x: Tensor) -> Tensor:
        q, k, _ = self.project(x)
        return self.weights(q.to(accumulate(q)), k.to(accumulate(k)))
