"""What `tab.compare`, `tab.sweep` and `tab.bench` return: a summary, a picture, a directory."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..drawing.figures import Picture, kept
from .rows import Rows

if TYPE_CHECKING:
    import pandas


class Result:
    """Base of the results. Subclasses write `rows`, `headline` and `plot`."""

    directory: Path | None  # with the files that it was read from; None: nothing was kept

    def rows(self) -> Rows:
        """All that is known, a dict a line."""
        raise NotImplementedError

    def headline(self) -> str:
        """One line above the table."""
        raise NotImplementedError

    def plot(self) -> Picture:
        """A matplotlib figure, which a notebook shows and `savefig(path)` writes."""
        raise NotImplementedError

    @property
    def summary(self) -> pandas.DataFrame | Rows:
        """`rows` as a pandas DataFrame where pandas is installed, else as they are."""
        try:
            import pandas
        except ModuleNotFoundError:
            return self.rows()
        return pandas.DataFrame(list(self.rows()))

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        return Group(Text(self.headline()), self.rows())

    def __repr__(self) -> str:
        return f"{self.headline()}\n{self.rows()!r}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.headline())}</p>{self.rows()._repr_html_()}"


def drawn(draw: Callable[[Path], object]) -> Picture:
    """The figure that `draw` would save at the path that it is given."""
    with kept() as pictures:
        draw(Path("none.png"))
    if not pictures:
        raise ValueError("there is nothing to draw yet: nothing of it has ended with a result")
    return pictures[0]
