"""A small comparison of the control with an attention of a plugin, `mine`."""

from pathlib import Path

from small_cli import SMALL, tab


def compared(mine: Path, out: Path, *more: object):
    words = ("--models", "mlp", "--attentions", "none,mine", "--plugin", mine, "--out", out)
    return tab("compare", *words, *SMALL, *more)
