"""Layers whose linear parts were changed from outside: hooks, adapters, pruning, parametrizations
and quantization act on what a layer computes, wherever its own code would do without the call."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from tab.layers import build_attention, layer_names

N, C = 12, 16
EXPERTS = {"num_experts": 2, "top_k": 2}  # all are chosen: rounding chooses no other
KINDS = {name: (name, {}) for name in layer_names()} | {
    "deepseek_mla": ("deepseek_mla", EXPERTS),
    "kimi_k2": ("kimi_k2", EXPERTS),
    "kimi_k2 mha": ("kimi_k2", {"attention": "mha", **EXPERTS}),
    "linformer both": ("linformer", {"share_kv": False, "share_heads": False}),
}
pytestmark = pytest.mark.usefixtures("quiet")


def build(kind, **more):
    name, options = KINDS[kind]
    torch.manual_seed(0)
    return build_attention(name, C, seq_len=N, **options, **more).eval()


def tokens():
    x = torch.randn(2, N, C, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(N) < torch.tensor([[7], [N]])


def linears():
    return [
        (kind, name)
        for kind in KINDS
        for name, module in build(kind).named_modules()
        if type(module) is nn.Linear
    ]


class Adapter(nn.Module):
    """As LoRA's: it has the weight of what it wraps, and computes something else."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = (nn.Linear(n, m, False) for n, m in ((C, 2), (2, base.out_features)))

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize(("kind", "name"), linears())
def test_what_a_linear_part_has_beside_its_weight_counts(kind, name):
    """Each way against the layer that has the same as its weight."""
    plain, x = build(kind), tokens()
    with torch.no_grad():
        seen, hooked = [], copy.deepcopy(plain)
        hooked.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
        assert_close(hooked(*x), plain(*x))
        assert seen

        part = plain.get_submodule(name)
        pruned = copy.deepcopy(plain)
        prune.l1_unstructured(pruned.get_submodule(name), "weight", 0.5)
        wanted = copy.deepcopy(plain)
        wanted.get_submodule(name).weight.mul_(3 * pruned.get_submodule(name).weight_mask)
        pruned.get_submodule(name).weight_orig.mul_(3)  # an optimizer's step
        assert_close(pruned(*x), wanted(*x))

        if part.in_features == C:
            adapted, wanted = copy.deepcopy(plain), copy.deepcopy(plain)
            parent, _, leaf = name.rpartition(".")
            adapter = Adapter(adapted.get_submodule(name))
            setattr(adapted.get_submodule(parent), leaf, adapter)
            wanted.get_submodule(name).weight.add_(adapter.up.weight @ adapter.down.weight)
            assert_close(adapted(*x), wanted(*x), atol=1e-5, rtol=1e-4)

    normed = copy.deepcopy(plain)
    parametrizations.weight_norm(normed.get_submodule(name))
    assert_close(normed(*x), plain(*x))
    for _ in range(2):  # a graph that is kept from one step to the next would fail here
        normed(*x).sum().backward()
    assert normed.get_submodule(name).parametrizations.weight.original1.grad is not None


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_layer_runs(kind):
    plain, x = build(kind), tokens()
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(plain), {nn.Linear})
    error = (quantized(*x) - plain(*x)).abs().max()
    assert error < 0.1 * plain(*x).abs().max()


@pytest.mark.parametrize(("attention", "name"), [("mla", "q_up"), ("mha", "qkv")])
def test_a_clip_that_would_be_lost_is_refused(attention, name):
    layer = build("kimi_k2", attention=attention, tau=1e-3)
    parametrizations.weight_norm(layer.attention.get_submodule(name))
    layer.train()(tokens()[0])
    with pytest.raises(ValueError, match="QK-Clip scales the weight of Parametrized"):
        layer.after_step()


@pytest.mark.parametrize("tau", [0.0, float("inf"), float("nan")])
def test_no_limit_makes_numbers_of_nothing(tau):
    with pytest.raises(ValueError, match=f"tau={tau}: must be at least 1e-30"):
        build("kimi_k2", tau=tau)
