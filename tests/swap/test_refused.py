"""`tab.swap_attention`: what cannot be carried or kept is an error, at the swap or in `forward`."""

import pytest
import torch
from small_models import HEADS, C, N, encoder, vit
from torch import nn

import tab
from tab.layers import HeadsAttention, _registry, build_attention


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, N, C, generator=torch.Generator().manual_seed(2))


class Biasless(HeadsAttention):
    """Reads the weight of its projection, and forgets that it may have a bias."""

    def project(self, x):
        parts = (x @ self.qkv.weight.T).split(self.widths, -1)
        return tuple(t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in parts)

    def attend(self, q, k, v, key_mask):
        return q + k + v


class Windowed(nn.Module):
    """Stands for an attention of a class that nobody here knows."""


Windowed.__name__ = "WindowAttention"


def _hooked() -> nn.Module:
    model = encoder()
    model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    return model


def _beside() -> nn.Module:
    return nn.Sequential(encoder(), Windowed())


REFUSED = [
    (lambda: encoder(dropout=0.1), {}, r"layers\.0\.self_attn.*drops.*0\.1.*`dropout` to 0\.0"),
    (lambda: vit(attn_drop_rate=0.2), {}, r"blocks\.0\.attn.*drops.*0\.2"),
    (lambda: vit(qk_norm=True), {}, "q_norm, k_norm cannot be kept"),
    (lambda: vit(scale_attn_norm=True), {}, "norm cannot be kept"),
    (lambda: nn.MultiheadAttention(C, HEADS, kdim=8), {}, "kdim"),
    (lambda: nn.MultiheadAttention(C, HEADS, add_bias_kv=True), {}, "add_bias_kv"),
    (lambda: nn.MultiheadAttention(C, HEADS, add_zero_attn=True), {}, "add_zero_attn"),
    (lambda: nn.TransformerDecoderLayer(C, HEADS, dropout=0.0), {}, "another sequence"),
    (lambda: nn.Linear(3, 3), {}, "Linear holds no"),
    (lambda: nn.Sequential(Windowed()), {}, r"holds no.*0 \(WindowAttention\)"),
    (_beside, {}, r"1 \(WindowAttention\).*modules=\['0\.layers\.0\.self_attn'"),
    (_hooked, {}, "hooks"),
    (encoder, {"seq_len": None}, "give seq_len"),
    (lambda: vit(dynamic_img_size=True), {"seq_len": None}, "several sizes"),
    (encoder, {"num_heads": 8}, "num_heads=4, not 8"),
    (encoder, {"inner_dim": 64}, r"\(192, 32\).*\(96, 32\)"),
    (encoder, {"features": 3}, "no option features"),
    (encoder, {"attention": "perfomer"}, "did you mean 'performer'"),
    (encoder, {"attention": "biasless"}, r"does not use qkv\.bias"),
    (encoder, {"attention": "deepseek_mla", "carry": False}, "residual stream.*num_experts=0"),
]


@pytest.mark.parametrize(("build", "changes", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_kept_is_an_error(build, changes, words, monkeypatch):
    monkeypatch.setitem(_registry._layers, "biasless", Biasless)
    model = build()
    before = {name: type(m) for name, m in model.named_modules()}
    given = {"attention": "performer", "seq_len": N + 1} | changes
    with pytest.raises(ValueError, match=words):
        tab.swap_attention(model, **given)
    assert before == {name: type(m) for name, m in model.named_modules()}


def test_calls_that_the_mechanism_cannot_take(x):
    model = tab.swap_attention(encoder(1), "performer", seq_len=N)
    layer, causal = model.layers[0].self_attn, nn.Transformer.generate_square_subsequent_mask(N)
    for training in (True, False):
        with pytest.raises(ValueError, match="performer takes no attn_mask"):
            model.train(training)(x, mask=causal)
    quiet = {"need_weights": False}
    with pytest.raises(ValueError, match="no attn_mask and no is_causal"):
        layer(x, x, x, is_causal=True, **quiet)
    with pytest.raises(ValueError, match="from one sequence"):
        layer(x, x.clone(), x, **quiet)
    with pytest.raises(ValueError, match="need_weights=False"):
        layer(x, x, x)
    with pytest.raises(ValueError, match="in between cannot be kept"):
        layer(x, x, x, key_padding_mask=torch.full((3, N), -1.0), **quiet)
    with pytest.raises(ValueError, match="takes no attn_mask"):
        tab.swap_attention(vit(), "performer").blocks[0].attn(torch.zeros(1, 17, C), causal)


def test_gradient_checks_leave_nothing_behind():
    """What is tried at the swap leaves no gradient, and draws no random number."""
    model = encoder(1)
    torch.manual_seed(0)
    build_attention("performer", C, seq_len=N)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    tab.swap_attention(model, "performer", seq_len=N)
    assert torch.equal(torch.rand(1), wanted)
    assert all(p.grad is None for p in model.parameters())
