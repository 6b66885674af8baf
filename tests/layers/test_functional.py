"""Layers under torch.func, exported with any number of sequences and tokens, in shared memory, and
with spectral norm: what users of PyTorch do with a module."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.testing import assert_close

import tab
from tab.layers import build_attention, layer_names

N, C = 12, 16
WITHOUT = {"none", "none_again"}  # weights
pytestmark = pytest.mark.usefixtures("quiet")
names = pytest.mark.parametrize("name", layer_names())
learned = pytest.mark.parametrize("name", [x for x in layer_names() if x not in WITHOUT])


def build(name, seed=0):
    torch.manual_seed(seed)
    return build_attention(name, C, seq_len=N).eval()


def tokens(*shape):
    return torch.randn(*shape, C, generator=torch.Generator().manual_seed(1))


def state(layer):
    return dict(layer.named_parameters()), dict(layer.named_buffers())


def gradients(layer, x):
    layer.zero_grad()
    layer(x).square().sum().backward()
    return {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


@learned
def test_gradients_of_each_sequence(name):
    """By functional_call, grad and vmap: those of one after the other."""
    layer, x = build(name), tokens(3, N)
    weights, buffers = state(layer)

    def loss(weights, one):
        return functional_call(layer, (weights, buffers), (one[None],)).square().sum()

    assert torch.equal(functional_call(layer, (weights, buffers), (x,)), layer(x))
    found = vmap(grad(loss), (None, 0))(weights, x)
    for i in range(3):
        for key, wanted in gradients(layer, x[i : i + 1]).items():
            assert_close(found[key][i], wanted, atol=1e-4, rtol=1e-4, msg=f"{key} of {i}")


@learned
def test_an_ensemble_is_one_call(name):
    layers, x = [build(name, seed) for seed in range(2)], tokens(2, N)
    weights, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")

    def run(weights, buffers):
        return functional_call(base, (weights, buffers), (x,))

    for found, layer in zip(vmap(run)(weights, buffers), layers, strict=True):
        assert_close(found, layer(x), atol=1e-5, rtol=1e-4)


@names
def test_over_a_third_dimension_and_its_jacobian(name):
    layer, x = build(name), tokens(3, 2, N)
    assert_close(vmap(layer)(x), torch.stack([layer(one) for one in x]), atol=1e-5, rtol=1e-4)
    layer, x = layer.double(), x[0, :1].double()

    def sums(x):
        return layer(x).sum((0, 1))  # (C,)

    assert_close(jacrev(sums)(x), torch.autograd.functional.jacobian(sums, x))


# Whose graph is another where few tokens are kept: torch.export says which N it serves.
BOUNDED = {"kv_compression": 4}


@names
@pytest.mark.parametrize("masked", [False, True])
def test_one_exported_program_serves_every_batch_and_length(name, masked):
    layer, least = build(name), BOUNDED.get(name, 2)
    sizes = {0: torch.export.Dim("B", min=1, max=64), 1: torch.export.Dim("N", min=2, max=N)}
    if name in BOUNDED:
        sizes = dict.fromkeys((0, 1), torch.export.Dim.AUTO)
    given = (tokens(2, N), torch.arange(N).expand(2, N) < N - 3)[: 1 + masked]
    program = torch.export.export(layer, given, dynamic_shapes=(sizes,) * len(given)).module()
    for b, n in ((2, N), (5, 7), (1 if name not in BOUNDED else 2, least), (3, 5)):
        x, mask = tokens(b, n), torch.arange(n).expand(b, n) != 1
        given = (x, mask)[: 1 + masked]
        assert_close(program(*given), layer(*given), atol=1e-5, rtol=1e-4)


# Their choices of blocks, tokens and experts are operators of TAB's own (docs/mechanisms.md).
CHOOSE = {"sparse", "kv_compression", "deepseek_mla", "kimi_k2"}


@names
def test_on_the_reference_a_program_has_operators_of_pytorch_alone(name):
    """As ONNX wants them."""
    with tab.use_backend("reference"):
        program = torch.export.export(build(name), (tokens(2, N),))
    graphs = [part for part in program.graph_module.modules() if hasattr(part, "graph")]
    called = {str(node.target) for part in graphs for node in part.graph.nodes}
    assert any(each.startswith("aten.") for each in called) or name in WITHOUT
    assert any(each.startswith("tab.") for each in called) == (name in CHOOSE)


@names
def test_shared_memory_and_channels_last(name):
    layer, x = build(name), tokens(2, N)
    shared = copy.deepcopy(layer).share_memory()
    assert all(x.is_shared() for x in shared.state_dict().values())  # tables are each one's own
    assert torch.equal(shared(x), layer(x))
    assert_close(copy.deepcopy(layer).to(memory_format=torch.channels_last)(x), layer(x))


@learned
def test_spectral_norm(name):
    """Of each linear part: the layer computes with the weight that it makes."""
    layer, x = build(name), tokens(2, N)
    parts = [key for key, part in layer.named_modules() if type(part) is nn.Linear]
    plain = copy.deepcopy(layer)
    for key in parts:
        part = layer.get_submodule(key)
        before = part.weight.detach().clone()
        nn.utils.parametrizations.spectral_norm(part, n_power_iterations=50)
        with torch.no_grad():
            plain.get_submodule(key).weight.copy_(part.weight)
        assert not torch.allclose(part.weight, before)
    assert_close(layer(x), plain(x), atol=1e-5, rtol=1e-4)
    layer(x).square().sum().backward()
    for key in parts:
        assert layer.get_submodule(key).parametrizations.weight.original.grad is not None
