"""The rule for masks, the same in every layer: a masked token takes part in nothing. And batches
without a token."""

import pytest
import torch

from tab.layers import Attention, build_attention, layer_names

N, C, REAL = 12, 16, 7
KINDS = {name: (name, {}) for name in layer_names()} | {
    "deepseek_mla with balance": ("deepseek_mla", {"balance_alpha": 0.1}),
    "kimi_k2 mla": ("kimi_k2", {"attention": "mla"}),
    "linear softmax": ("linear", {"feature_map": "softmax"}),
    "performer relu": ("performer", {"kernel": "relu"}),
    "sparse small": ("sparse", {"block_size": 2, "num_random": 1}),
    "local grid": ("local", {"two_dimensional": True, "grid": (3, 4), "window_size": 2}),
    "linformer heads": ("linformer", {"share_heads": False, "share_kv": False}),
    "kv_compression exact": ("kv_compression", {"mode": "exact"}),
    "dwconv grid": ("dwconv", {"grid": (3, 4)}),
    "mixer rank": ("mixer", {"rank": 3}),
    "flex causal": ("flex", {"pattern": "causal"}),
}
kinds = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.usefixtures("quiet")


def build(kind):
    name, options = KINDS[kind]
    torch.manual_seed(0)
    return build_attention(name, C, seq_len=N, **options)


@pytest.mark.parametrize("given", [lambda x: x[:, :1], lambda x: x[..., :1], lambda x: (x, None)])
def test_an_output_that_would_broadcast_is_refused(given):
    """Added to x it would be taken for one of each token, or feature."""

    class Wrong(Attention):
        def compute(self, x, key_mask):
            return given(x)

    x, mask = masked()
    for key_mask in (None, mask):
        with pytest.raises(ValueError, match=r"Wrong\.compute has to return \(B, N, C\)"):
            Wrong()(x, key_mask)


@kinds
def test_tokens_of_another_width_are_refused_by_the_layer(kind):
    """And not by the first product inside of it, which names neither the layer nor x."""
    layer, x = build(kind), torch.randn(2, N, C + 4)
    if kind.startswith("none"):
        assert layer(x).shape == x.shape
        return
    name = type(layer).__name__
    with pytest.raises(ValueError, match=rf"{name} wants x \(B, N, 16\), got x \(2, 12, 20\)"):
        layer(x)
    with pytest.raises(ValueError, match=rf"{name} wants x \(B, N, 16\), got x \(12, 16\)"):
        layer(x[0, :, :C])


def masked():
    """x (2, N, C) and its mask: the first entry ends after REAL tokens, the second is whole."""
    x = torch.randn(2, N, C, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(N) < torch.tensor([[REAL], [N]])


def learn(layer, x, mask):
    """The output, and the gradients of all of it by x and the parameters."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x, mask)
    loss, extra = y.square().sum(), layer.auxiliary_loss()
    (loss if extra is None else loss + extra).backward()
    return y.detach(), [x.grad, *(p.grad for p in layer.parameters())]


@kinds
@pytest.mark.parametrize("what", [float("nan"), float("inf"), 1e30])
def test_what_a_masked_token_holds_reaches_nobody(kind, what):
    layer, (x, mask) = build(kind), masked()
    y, grads = learn(layer, x, mask)
    other = x.clone()
    other[0, REAL:] = what
    y2, grads2 = learn(layer, other, mask)
    assert torch.equal(y, y2) and y.isfinite().all()
    for a, b in zip(grads, grads2, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and a.isfinite().all())
    assert not y[0, REAL:].any() and not grads[0][0, REAL:].any()
    assert y[0, :REAL].any() and grads[0][0, :REAL].any()


@kinds
def test_a_batch_entry_without_a_token(kind):
    """It gives 0, finite gradients, and leaves those of the others as they are."""
    layer, (x, _) = build(kind), masked()
    mask = torch.tensor([[False], [True]]).expand(2, N)
    y, grads = learn(layer, x, mask)
    assert not y[0].any() and not grads[0][0].any()
    assert all(g is None or g.isfinite().all() for g in grads)
    if (alone := layer.auxiliary_loss()) is None:  # which is a mean over the entries
        alone, expected = learn(layer, x[1:], None)
        torch.testing.assert_close(y[1:], alone)
        for a, b in zip(grads[1:], expected[1:], strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@kinds
@pytest.mark.parametrize("shape", [(0, N), (2, 0), (0, 0)])
def test_an_empty_batch(kind, shape):
    layer = build(kind)
    x = torch.empty(*shape, C, requires_grad=True)
    for mask in (None, torch.ones(shape, dtype=torch.bool)):
        layer.zero_grad()
        y = layer(x, mask)
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
        layer.after_step()
        assert all(s.sum() in (0, -torch.inf) for s in layer.statistics())
    assert all(p.isfinite().all() for p in layer.parameters())


MASKS = {
    "float": (lambda m: m.float(), r"key_mask \(2, 12\) bool.* got key_mask \(2, 12\) float32"),
    "int": (lambda m: m.long(), "int64"),
    "byte": (lambda m: m.byte(), "uint8"),
    "(B, 1)": (lambda m: m[:, :1], r"got key_mask \(2, 1\) bool"),
    "(1, N)": (lambda m: m[:1], r"\(1, 12\)"),
    "(N,)": (lambda m: m[0], r"\(12,\)"),
    "(B, N, 1)": (lambda m: m[..., None], r"\(2, 12, 1\)"),
    "(B, 1, 1, N)": (lambda m: m[:, None, None], r"\(2, 1, 1, 12\)"),
    "list": (lambda m: m.tolist(), "got list"),
    "elsewhere": (lambda m: m.to("meta"), "on x's device, got .* meta, x .* cpu"),
}


@pytest.mark.parametrize("name", layer_names())
@pytest.mark.parametrize("given", MASKS)
def test_any_other_mask_is_refused(name, given):
    (x, mask), (make, says) = masked(), MASKS[given]
    layer = build(name)
    with pytest.raises(ValueError, match=f"{type(layer).__name__} wants .*{says}"):
        layer(x, make(mask))
