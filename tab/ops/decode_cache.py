"""The interface of what a decoder remembers, and what all caches (tab/ops/decode/) share."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ._check import shapes
from ._typed import typed

Size = int | str  # a letter stands for one number wherever it comes


class DecodeCache(ABC):
    """What causal attention has to remember of the tokens so far to go on with the next ones.

    Each mechanism has its own, and all have one interface:

    prefill(q, k, v): any number of tokens, as often as one likes (a prompt in chunks); what their
        queries see is what the causal function would have shown them. q (B, H, N, D), k
        (B, H_kv, N, D), v (B, H_kv, N, Dv) -> o (B, H, N, Dv).
    step(q, k, v): one token of each sequence, N = 1.
    length: tokens so far, of the longest sequence; bytes: memory held, reserved rows included.
    state_dict(), load_state_dict(d): tensors alone, for safetensors and
        torch.load(weights_only=True); a snapshot, which later steps do not change.
    reorder(index): the sequences `index` (B',) int64, each as often as it is named: what beam
        search keeps, or a batch without the sequences that ended.
    reset(): nothing remembered, as at first.

    `MLACache` takes what latent attention has in the place of q, k and v. The memory is the cache's
    own: what the caller does with his tensors afterwards changes nothing.

    Example: two beams of one prompt, which any cache continues alike.
        >>> cache: tab.DecodeCache = tab.LocalCache(window=4)
        >>> o = cache.prefill(*torch.randn(3, 1, 2, 10, 16))  # q, k, v, each (B, H, N, D)
        >>> cache.reorder(torch.tensor([0, 0]))
        >>> o = cache.step(*torch.randn(3, 2, 2, 1, 16))
        >>> o.shape, cache.length
        (torch.Size([2, 2, 1, 16]), 11)
    """

    NAMES: tuple[str, ...]  # of the tensors in state_dict()
    prefill: Callable[..., Tensor]
    step: Callable[..., Tensor]

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = typed(cls.__init__)

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens so far, of the longest sequence."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Memory held, with rows that are reserved for later tokens."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets all tokens, and gives the memory back."""

    @abstractmethod
    def _batch(self) -> int:
        """Sequences that it holds."""

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """What there is to keep, by NAMES, sequences first; empty before the first token."""

    @abstractmethod
    def _sizes(self, length: int) -> dict[str, tuple[Size, ...]]:
        """Of `_tensors` after that many tokens."""

    @abstractmethod
    def _restore(self, tensors: dict[str, Tensor], length: int) -> None:
        """Goes on from these, which are the cache's own."""

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of what is remembered, by name, and `length`, a number."""
        with ordinary():
            held = {name: x.detach().clone() for name, x in self._tensors().items()}
            return {"length": torch.tensor(self.length, device="cpu"), **held}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what state_dict() gave: of a cache with the same options, on the device
        where these tensors lie."""
        name = f"{type(self).__name__}.load_state_dict"
        given = {key: x for key, x in state.items() if key != "length"}
        if "length" not in state or (given and given.keys() != {*self.NAMES}):
            raise ValueError(
                f"{name} wants length and {', '.join(self.NAMES)}, as state_dict() gives them; "
                f"got {', '.join(state) or 'nothing'}"
            )
        if not given:
            return self.reset()
        length = int(state["length"])
        sizes, bound = self._sizes(length), dict[str, int]()
        if not all(_fits(given[key].shape, sizes[key], bound) for key in self.NAMES):
            want = ", ".join(f"{key} ({', '.join(map(str, sizes[key]))})" for key in self.NAMES)
            raise ValueError(f"{name} wants {want} of {length} tokens; got {shapes(**given)}")
        with ordinary():
            self.reset()
            self._restore({key: given[key].detach().clone() for key in self.NAMES}, length)

    def reorder(self, index: Tensor) -> None:
        """Keeps the sequences `index` (B',) int64, in this order, each as often as it is named."""
        count = self._batch()
        rule = index.dim() == 1 and index.dtype in (torch.int32, torch.int64)
        if not rule or (index.numel() and not 0 <= index.min() <= index.max() < count):
            raise ValueError(
                f"{type(self).__name__}.reorder wants the numbers (B',) int64 of its {count} "
                f"sequences, from 0; got {shapes(index=index)} of {index.tolist()}"
            )
        if count:
            self._pick(index)

    def _pick(self, index: Tensor) -> None:
        with ordinary():
            picked = {name: x.index_select(0, index) for name, x in self._tensors().items()}
            self._restore(picked, self.length)


def ordinary() -> contextlib.AbstractContextManager:
    """Tensors that are made within can be written to after inference mode, too."""
    on = torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if on else contextlib.nullcontext()


def keeps_no_graph(where: str, instead: str, *tensors: Tensor) -> None:
    """A RuntimeError where a gradient would be lost."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError(
            f"{where} records no gradients: call it under torch.no_grad() or "
            f"torch.inference_mode(), or with detached tensors; to train, call {instead}"
        )


def _fits(shape: torch.Size, sizes: tuple[Size, ...], bound: dict[str, int]) -> bool:
    """Whether the sizes are these; letters are bound to what they met first."""
    if len(shape) != len(sizes):
        return False
    pairs = zip(shape, sizes, strict=True)
    return all(n == (bound.setdefault(s, n) if isinstance(s, str) else s) for n, s in pairs)
