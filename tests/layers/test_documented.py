"""What layers say of themselves: the examples in their docstrings run, and `repr` shows options."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import tab.layers
from tab.layers import (
    Attention,
    _registry,
    attention_options,
    build_attention,
    layer_names,
    register_attention,
)

MODULES = [m.name for m in pkgutil.iter_modules(tab.layers.__path__) if m.name[0] != "_"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(f"tab.layers.{name}")
    x = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    given = {"torch": torch, "build_attention": build_attention, "x": x}
    ran = doctest.testmod(module, extraglobs=given)
    assert not ran.failed
    assert ran.attempted or ">>>" not in inspect.getsource(module)


def test_every_attention_has_an_example_and_a_title():
    for name in layer_names():
        kind = tab.layers.get_attention(name)
        assert kind.__doc__ and kind.title, name
        assert ">>>" in kind.__doc__ or not kind.is_attention, name


@pytest.mark.parametrize("name", layer_names())
@pytest.mark.parametrize("published", [False, True], ids=["", "published"])
def test_repr_shows_every_option(name, published):
    layer = build_attention(name, 32, seq_len=64, published=published)
    shown = repr(layer)
    for option in ("dim", "seq_len", "grid", *attention_options(name, published=published)):
        assert f"{option}=" in shown.partition("\n  (")[0]


class Mine(Attention):
    def __init__(self, dim, *, seq_len, grid=None, width=None, rule=None):
        super().__init__()
        self.width = width or 2 * dim
        self.register_buffer("seed", torch.tensor(3))


def test_repr_of_a_layer_of_others():
    """Options in it as they were given, but for a size that it has found by itself."""
    assert repr(Mine(8, seq_len=4, rule=len)) == (
        "Mine(dim=8, seq_len=4, grid=None, width=16, rule=len)"
    )


def test_a_layer_may_leave_out_what_it_does_not_need():
    """The smallest layer of docs/own-attention.md that has no heads."""

    class Mean(Attention):
        def compute(self, x, key_mask):
            return x.mean(1, keepdim=True).expand_as(x)

    register_attention("a mean")(Mean)
    try:
        assert attention_options("a mean") == {}
        layer, x = build_attention("a mean", 8, seq_len=4, grid=(2, 2)), torch.randn(3, 4, 8)
        assert torch.equal(layer(x), x.mean(1, keepdim=True).expand_as(x))
        assert repr(layer) == "Mean(dim=8, seq_len=4, grid=(2, 2))"
    finally:
        _registry._layers.pop("a mean")


@pytest.mark.parametrize(
    ("takes", "message"),
    [
        (lambda self, dim: None, "takes no seq_len and takes no grid"),
        (lambda self, dim, *, seq_len, grid=None, size: None, "has no default for size"),
    ],
)
def test_a_layer_that_cannot_be_built_is_refused_at_once(takes, message):
    with pytest.raises(TypeError, match=f"of Odd {message}; a layer takes"):
        register_attention("odd")(type("Odd", (Attention,), {"__init__": takes}))
    assert "odd" not in layer_names()


def test_parts_show_their_options_too():
    shown = repr(build_attention("deepseek_mla", 32, seq_len=64, num_experts=4))
    for part in ("LatentAttention(", "Rope(", "MoE(", "SwiGLU("):
        assert part in shown
    assert "kv_rank=8" in shown and "expert_dim=16" in shown  # which were None


def test_repr_shows_the_seed_that_was_loaded():
    layers = [build_attention("sparse", 32, seq_len=64, seed=seed) for seed in (0, 5)]
    layers[0].load_state_dict(layers[1].state_dict())
    assert "seed=5" in repr(layers[0])
