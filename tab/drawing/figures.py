"""Matplotlib figures that leave pyplot and its backend alone, so that a caller's notebook or window
stays as it is; and the way to have a picture as a figure in place of a file."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_kept: ContextVar[list[Picture] | None] = ContextVar("kept", default=None)


class Picture(Figure):
    """A figure that is saved whole, with the words beside its axes, and that a notebook shows."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        FigureCanvasAgg(self)  # sets self.canvas

    def savefig(self, *args, **options) -> None:
        super().savefig(*args, **{"bbox_inches": "tight", **options})

    def _repr_png_(self) -> bytes:
        text = io.BytesIO()
        self.savefig(text, format="png")
        return text.getvalue()

    def keep(self, *paths: Path, **options) -> None:
        """Saves it as each of these, whole or not at all; within `kept` it is put aside instead."""
        if (pictures := _kept.get()) is not None:
            pictures.append(self)
            return
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp{path.suffix}")
            try:
                self.savefig(temporary, **options)
                temporary.replace(path)
            except OSError as error:  # matplotlib names no file
                text = f"cannot write: {error.strerror}"
                raise OSError(error.errno, text, str(path)) from error
            finally:
                temporary.unlink(missing_ok=True)


@contextmanager
def kept() -> Iterator[list[Picture]]:
    """Within it no picture is written: each figure is put into the list that this yields."""
    pictures: list[Picture] = []
    token = _kept.set(pictures)
    try:
        yield pictures
    finally:
        _kept.reset(token)
