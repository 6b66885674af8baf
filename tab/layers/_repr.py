"""Layers and their parts print the options that they were built with, as PyTorch's modules do."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn


class Shown(nn.Module):
    """Keeps what its constructor was given, for `repr`: layers of others are shown whole too.

    A size that was None, and that the module knows by now, is shown as it is; so is a number that
    is a buffer, as a state_dict may have brought another.
    """

    _given: tuple[tuple, dict]

    if TYPE_CHECKING:  # torch says Tensor | Module of each part, whatever it is

        def __getattr__(self, name: str) -> Any: ...

    def __new__(cls, *args, **options):
        module = super().__new__(cls)
        vars(module)["_given"] = args, options
        return module

    def extra_repr(self) -> str:
        args, options = self._given
        bound = inspect.signature(type(self).__init__).bind(self, *args, **options)
        bound.apply_defaults()
        _, *given = bound.arguments.items()
        return ", ".join(f"{name}={self._shown(name, value)}" for name, value in given)

    def _shown(self, name: str, value: object) -> str:
        buffer, known = self._buffers.get(name), vars(self).get(name)
        if buffer is not None and buffer.numel() == 1 and not buffer.is_meta:
            value = buffer.item()
        elif value is None and isinstance(known, int):
            value = known
        # A rule of one's own by its name: where it lies in memory says nothing.
        return getattr(value, "__name__", "") or repr(value)
