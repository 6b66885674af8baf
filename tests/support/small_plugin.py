"""A small comparison of the control with an attention of a plugin, `mine`."""

from pathlib import Path

import pytest
from small_cli import SMALL, tab

from tab import plugins
from tab.layers import _registry

BROKEN = """
import torch
from tab.layers import Attention, register_attention

@register_attention("mine")
class Mine(Attention):
    title = "My own"

    def __init__(self, dim, *, seq_len, grid=None):
        super().__init__()
        self.proj = torch.nn.Linear(dim, dim)

    def compute(self, x, key_mask):
        if self.training:
            raise RuntimeError("not yet")
        return self.proj(x)
"""
MENDED = BROKEN.replace('raise RuntimeError("not yet")', "return self.proj(x)")


@pytest.fixture
def forgotten(monkeypatch):
    """What a test loads is not there in the next one."""
    monkeypatch.setattr(_registry, "_layers", dict(_registry._layers))
    monkeypatch.setattr(plugins, "_loaded", {})


@pytest.fixture
def mine(tmp_path, forgotten) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(BROKEN)
    return path


def compared(mine: Path, out: Path, *more: object):
    words = ("--models", "mlp", "--attentions", "none,mine", "--plugin", mine, "--out", out)
    return tab("compare", *words, *SMALL, *more)


def packaged(tmp_path: Path, monkeypatch, name: str, source: str) -> Path:
    """The layer of a plugin that is a package, `name`, to be imported in this test alone."""
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text("from .layer import Mine\n")
    (package / "layer.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return package / "layer.py"
