"""The pictures drawn from trained weights: attention matrices, filters of the first layer."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from torch import Tensor

from .style import figure
from .text import counted, title

HEADS = 4
FILTERS = 24
TITLE = {"fontsize": 9, "y": 1.0}  # without y all ticks are measured, in case one stands above


@torch.no_grad()
def attention_weights(model, x: Tensor) -> Tensor | str:
    """The matrices (H', N, N) of up to four heads for one image x (1, 3, H, W), from the layer's
    own weights; or in words why there are none. A layer of others that fails in this costs its
    picture, and not the report."""
    model.eval()
    try:
        tokens = model.tokens(x)
        found = model.attention.attention_matrix(tokens)
        if found.dim() != 4 or found.shape[::2] != (1, tokens.shape[1]) or found.shape[3] < 1:
            raise ValueError(f"its shape is {tuple(found.shape)}, wanted is (B, H, N, N)")
        return found[0, :HEADS].float().cpu()
    except NotImplementedError:
        return "no attention matrix"
    except Exception as error:
        name, what = type(model.attention).__name__, f"{type(error).__name__}: {error}"
        warnings.warn(f"the attention matrix of {name} is not drawn: {what}", stacklevel=3)
        return textwrap.shorten(what, 40, placeholder=" …")


def attention_picture(
    path: Path, maps: dict[str, Tensor | str], image: Tensor, heading: str
) -> None:
    """maps: mechanism -> its matrices (H', N, N), or why it has none. A mechanism is one panel, its
    heads side by side; each matrix is scaled to its own largest weight. image (H, W, 3) uint8: what
    they attend to."""
    height = 1.3 + 1.0 / -(-len(maps) // 3)  # of a row, with its share of the heading
    with figure(path, len(maps), columns=3, width=4.6, height=height) as (fig, axes):
        fig.subplots_adjust(wspace=0.12, hspace=0.45)
        for ax, (attention, heads) in zip(axes, maps.items(), strict=True):
            _bare(ax)
            ax.set_xlim(0, HEADS), ax.set_ylim(0, 1)
            ax.set_aspect("equal")
            size = heads if isinstance(heads, str) else counted(heads.shape[-1], "token")
            ax.set_title(title(attention), **TITLE)
            small = {"fontsize": 7.5, "color": "#666666", "fontweight": "normal"}
            ax.set_title(size, loc="right", **{**TITLE, **small})
            for i, head in enumerate([] if isinstance(heads, str) else heads):
                shown = (head / head.max().clamp_min(1e-12)).numpy()
                look = {"cmap": "magma", "norm": PowerNorm(0.5, 0, 1), "interpolation": "nearest"}
                ax.imshow(shown, extent=(i, i + 0.94, 0, 0.94), zorder=2, **look)
            ax.set_xlim(0, HEADS), ax.set_ylim(0, 1)
        height, width = fig.get_figheight(), fig.get_figwidth()
        lines = _heading(fig, heading, width - 1.6)
        fig.subplots_adjust(top=1 - (0.55 + 0.2 * lines) / height)
        corner = fig.add_axes((0.9 - 0.6 / width, 1 - 0.45 / height, 0.6 / width, 0.6 / height))
        _bare(corner)
        corner.imshow(image.numpy())


def filters_picture(path: Path, filters: dict[str, Tensor], heading: str) -> None:
    """filters: mechanism -> weights of the first layer (F, 3, rows, cols). The largest by norm,
    each scaled to its own range with 0 in the middle grey."""
    tiles = {name: mosaic(weight.detach().float().cpu()) for name, weight in filters.items()}
    height = 0.4 + 4.2 * max(tile.shape[0] / tile.shape[1] for tile in tiles.values())
    with figure(path, len(tiles), columns=3, width=4.6, height=height) as (fig, axes):
        fig.subplots_adjust(wspace=0.12, hspace=0.28)
        for ax, (attention, tile) in zip(axes, tiles.items(), strict=True):
            _bare(ax)
            ax.set_title(title(attention), **TITLE)
            ax.imshow(tile, interpolation="nearest")
        lines = _heading(fig, heading, fig.get_figwidth() - 1)
        fig.subplots_adjust(top=1 - (0.4 + 0.2 * lines) / fig.get_figheight())


def mosaic(weight: Tensor, across: int = 8) -> np.ndarray:
    """(F, 3, rows, cols) -> one picture (…, …, 3) of the FILTERS strongest, in 0…1."""
    strongest = weight.flatten(1).norm(dim=1).argsort(descending=True)[:FILTERS]
    tiles = weight[strongest]  # (F', 3, rows, cols)
    tiles = 0.5 + 0.5 * tiles / tiles.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    f, _, rows, cols = tiles.shape
    gap = max(1, rows // 8)
    down = -(-f // across)
    canvas = torch.ones(3, down * (rows + gap) - gap, across * (cols + gap) - gap)
    for i, tile in enumerate(tiles):
        y, x = (i // across) * (rows + gap), (i % across) * (cols + gap)
        canvas[:, y : y + rows, x : x + cols] = tile
    return canvas.permute(1, 2, 0).numpy()


def _heading(fig, text: str, width: float) -> int:
    """Over the whole figure, in lines of at most `width` inches; -> how many."""
    lines = textwrap.wrap(text, max(20, int(9.5 * width)))
    fig.suptitle("\n".join(lines), x=0.125, ha="left", fontweight="bold", fontsize=11)
    return len(lines)


def _bare(ax) -> None:
    ax.set_axis_off()
    ax.grid(False)
