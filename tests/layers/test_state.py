"""What a layer keeps wherever it goes: dtypes and back, the meta device, copies, state dicts."""

import copy
import io
import pickle

import pytest
import torch

from tab.layers import build_attention, layer_names
from tab.layers.rope import Rope
from tab.models.image_model import build_model, model_names
from tab.recipe.recipe import load_recipe

N, C = 12, 16
ROPE = ("multi_head", "linear", "performer", "sparse", "local", "kv_compression", "flex")
KINDS = {name: (name, {"rope": True} if name in ROPE else {}) for name in layer_names()} | {
    "kimi_k2": ("kimi_k2", {"attention": "mha", "tau": 0.3}),
    "kimi_k2 mla": ("kimi_k2", {"attention": "mla", "tau": 0.3, "q_rank": 5}),
    "sparse small": ("sparse", {"block_size": 2, "num_random": 1}),
    "deepseek_mla with balance": ("deepseek_mla", {"balance_alpha": 0.1}),
}
kinds = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.usefixtures("quiet")


def build(kind, start=0, **more):
    name, options = KINDS[kind]
    torch.manual_seed(start)
    return build_attention(name, C, seq_len=N, **options, **more)


def tokens(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def step(layer, x):
    """A step without an optimizer: statistics alone move the weights."""
    layer.train()(x)
    layer.after_step()
    return layer.eval()(x)


# --- the meta device ------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("how", ["to_empty", "assign", "there and back"])
def test_a_layer_from_the_meta_device(kind, how):
    real, x = build(kind), tokens(2, N, C)
    with torch.device("meta"):
        layer = build(kind)
    if how == "there and back":
        layer = build(kind).to("meta")
    assert not [p for p in (*layer.parameters(), *layer.buffers()) if not p.is_meta]
    if how == "assign":
        layer.load_state_dict(real.state_dict(), assign=True)
    else:
        torch.use_deterministic_algorithms(True)  # fresh memory is NaN
        try:
            layer.to_empty(device="cpu")
        finally:
            torch.use_deterministic_algorithms(False)
        layer.load_state_dict(real.state_dict())
    assert torch.equal(layer.eval()(x), real.eval()(x))
    torch.testing.assert_close(step(layer, x), step(copy.deepcopy(real), x))


@pytest.mark.parametrize("model", model_names())
@pytest.mark.parametrize("attention", ["none", "sparse", "deepseek_mla", "performer"])
def test_a_model_from_the_meta_device(model, attention):
    small = {"hidden": 16, "position": "learned"}
    if model in ("cnn", "resnet9"):
        small["channels"] = 4
    given = {f"model.{model}.{key}": value for key, value in small.items()}
    config = load_recipe("fair", given | {f"model.{model}.match": ""}).run_config(
        model, attention, 0
    )
    real = build_model(config, 10)
    with torch.device("meta"):
        net = build_model(config, 10)
    net.to_empty(device="cpu").load_state_dict(real.state_dict())
    x = tokens(2, 3, 32, 32)
    assert torch.equal(net.eval()(x), real.eval()(x))


# --- dtypes ---------------------------------------------------------------------------------------


def rope_truth(x, theta=1e4):
    n, d = x.shape[-2:]
    speed = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.arange(n, dtype=torch.float64)[:, None] * speed
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rope_rounds_once(dtype):
    x = tokens(1, 4096, 32).to(dtype)
    truth = rope_truth(x)
    bound = (truth.to(dtype).double() - truth).abs().max() * 2 + 4e-7 * (dtype != torch.float64)
    bound = max(bound.item(), 1e-14)
    for rope in (Rope(32, 4096), Rope(32, 4096).to(dtype), Rope(32, 4096).half().float()):
        assert (rope(x).double() - truth).abs().max() <= bound
    assert Rope(32, 4096).to(dtype).cos.dtype == torch.promote_types(dtype, torch.float32)


@kinds
def test_half_and_back(kind):
    """What is no weight is not rounded: float() after bfloat16() finds it as it was."""
    layer, x = build(kind), tokens(2, N, C)
    step(layer, x)
    if hasattr(layer, "moe"):
        layer.moe.bias.copy_(torch.linspace(-0.5, 0.5, 8) + 1e-3)
    exact = {name: b.clone() for name, b in layer.named_buffers() if b.is_floating_point()}
    low = copy.deepcopy(layer)
    for cast in ("bfloat16", "half", "float"):
        getattr(low, cast)()
        for name, b in low.named_buffers():
            if name in exact:
                assert b.dtype == torch.float32 and torch.equal(b, exact[name]), name
    double = copy.deepcopy(layer).double()
    for name, b in double.named_buffers():
        assert b.dtype != torch.float32, name
    # In bfloat16, against the same weights in float64.
    low = layer.bfloat16().eval()
    truth = copy.deepcopy(low).double()(x.bfloat16().double())
    y = low(x.bfloat16())
    assert y.dtype == torch.bfloat16
    if not hasattr(layer, "moe"):  # which may choose another expert
        assert (y.double() - truth).abs().max() <= 0.03 * truth.abs().max()


@kinds
def test_a_bfloat16_state_dict_comes_back(kind):
    layer, x = build(kind).bfloat16().eval(), tokens(2, N, C).bfloat16()
    other = build(kind, start=1).bfloat16().eval()
    other.load_state_dict(layer.state_dict())
    for (name, a), b in zip(layer.state_dict().items(), other.state_dict().values(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert torch.equal(layer(x), other(x))


@kinds
def test_double_is_double(kind):
    layer = build(kind).double()
    x = tokens(1, 5, C, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer.eval(), (x,), fast_mode=True)
    assert layer.attention_matrix(x).dtype == torch.float64 or kind.startswith("none")


@kinds
def test_autocast(kind):
    """bfloat16 out, gradients in the parameters' dtype, near those without autocast."""
    layer, x = build(kind), tokens(2, N, C)
    grads = []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x.clone().requires_grad_())
        y.float().square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
        assert y.dtype == (
            torch.bfloat16 if enabled and not kind.startswith("none") else torch.float32
        )
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads[1])
    if not hasattr(layer, "moe"):
        for a, b in zip(*grads, strict=True):
            assert (a - b).norm() <= 0.1 * a.norm() + 0.03 * max(g.norm() for g in grads[0])


# --- copies ---------------------------------------------------------------------------------------


@kinds
def test_copies_of_a_layer_in_use(kind):
    layer, x = build(kind), tokens(2, N, C)
    y = layer(x.requires_grad_())  # the graph is alive
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    copies.append(torch.load(file, weights_only=False))
    y.sum().backward()
    layer.eval()
    for other in copies:
        assert torch.equal(other.eval()(x), layer(x))


@kinds
def test_a_state_dict_is_all_that_a_layer_is(kind):
    """Also where the layer that loads it was built from another seed."""
    seeds = {"seed": 5} if kind.split()[0] in ("performer", "sparse") else {}
    layer, other, x = build(kind).eval(), build(kind, start=1, **seeds).eval(), tokens(2, N, C)
    other(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.attention_matrix(x), layer.attention_matrix(x))


def test_a_state_dict_without_the_seed_still_loads():
    """As those written before sparse kept it: the layer's own seed holds."""
    layer, other, x = build("sparse small"), build("sparse small", start=1), tokens(2, N, C)
    old = {name: value for name, value in layer.state_dict().items() if name != "seed"}
    assert len(old) == len(layer.state_dict()) - 1
    other.load_state_dict(old)
    assert torch.equal(other(x), layer(x))
