"""The layer "flex": PyTorch's FlexAttention and the dense path are the same function."""

import copy
import pickle
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from tab.layers import build_attention
from tab.layers import flex as module

BIAS = torch.randn(3, 65, 65, generator=torch.Generator().manual_seed(7))

MASKS = {
    "none": None,
    "parity": lambda b, h, i, j: (i + j + h) % 2 == 0,
    "heads": lambda b, h, i, j: (j <= i) | (h == 0),
    "dead rows": lambda b, h, i, j: (i > 3) & (j < 40),
}
SCORES = {
    "none": None,
    "alibi": lambda s, b, h, i, j: s - (i - j).abs() * 0.5 ** (h + 1),
    "softcap": lambda s, b, h, i, j: 2 * torch.tanh(s / 2),
    "table": lambda s, b, h, i, j: s + BIAS[h, i, j] * (b + 1),
    "hide": lambda s, b, h, i, j: torch.where((i - j) % 3 == 0, s, -torch.inf),
}


def make(n=65, dim=12, heads=3, **options):
    torch.manual_seed(0)
    return build_attention("flex", dim, seq_len=n, num_heads=heads, **options)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def both(layer, x, key_mask=None):
    """The outputs of FlexAttention itself (uncompiled) and of the dense path."""
    with torch.no_grad():
        q, k, v = layer.project(x)
        return layer.flex(q, k, v, key_mask, flex_attention), layer.dense(q, k, v, key_mask)


# Each mask with the score that hides pairs itself, each score with the mask that heads differ in.
@pytest.mark.parametrize(
    ("mask", "score"),
    sorted({("none", "none"), *((m, "hide") for m in MASKS), *(("heads", s) for s in SCORES)}),
)
def test_flex_is_dense(mask, score, generator):
    layer = make(pattern="full", mask_mod=MASKS[mask], score_mod=SCORES[score])
    x = torch.randn(2, 65, 12, generator=generator)
    flex, dense = both(layer, x)
    torch.testing.assert_close(flex, dense)
    if mask == "dead rows":
        assert not dense[:, :, :4].any()


@pytest.mark.parametrize("score", ["none", "alibi"])
def test_flex_is_dense_with_a_key_mask(score, generator):
    layer = make(20, pattern="causal", score_mod=SCORES[score])
    key_mask = torch.ones(2, 20, dtype=torch.bool)
    key_mask[0, 13:] = key_mask[1, :4] = False  # tokens 0 to 3 of the second see nothing
    flex, dense = both(layer, torch.randn(2, 20, 12, generator=generator), key_mask)
    torch.testing.assert_close(flex, dense)
    assert not dense[1, :, :4].any()


@pytest.mark.parametrize(("n", "heads"), [(1, 1), (63, 3), (65, 1)])
@pytest.mark.parametrize("pattern", module.PATTERNS)
def test_named_patterns(pattern, n, heads, generator):
    grid = {1: (1, 1), 63: (7, 9), 65: (5, 13)}[n]
    layer = make(n, heads=heads, pattern=pattern, window_size=4, grid=grid)
    x = torch.randn(2, n, 12, generator=generator)
    place = torch.tensor([divmod(i, grid[1]) for i in range(n)])
    i = torch.arange(n)
    step = i - i[:, None]
    seen = {
        "full": torch.ones(n, n, dtype=torch.bool),
        "causal": step <= 0,
        "window": step.abs() <= 2,
        "grid": ((place[None] - place[:, None]).abs() <= 2).all(-1),
    }[pattern]
    assert torch.equal(layer.attention_matrix(x)[0, 0] > 0, seen)
    q, k, v = layer.project(x)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(layer(x), layer.out(expected.transpose(1, 2).flatten(2)))
    flex, dense = both(layer, x)
    torch.testing.assert_close(flex, dense)


def test_a_line_is_a_grid_of_one_row(generator):
    x = torch.randn(1, 30, 12, generator=generator)
    grid, window = (make(30, pattern=p).attention_matrix(x) for p in ("grid", "window"))
    assert torch.equal(grid, window)


@pytest.mark.parametrize("score", SCORES)
def test_layer_is_its_attention_matrix(score, generator):
    layer = make(mask_mod=MASKS["heads"], score_mod=SCORES[score])
    x = torch.randn(2, 65, 12, generator=generator)
    matrix = layer.attention_matrix(x)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 3, 65))
    expected = layer.out((matrix @ layer.project(x)[2]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("score", [None, lambda s, b, h, i, j: s * 0.5 + (i - j) * 0.1])
def test_gradients(score, generator):
    """Against finite differences, with rows that see nothing."""
    layer = make(9, 4, 2, mask_mod=MASKS["dead rows"], score_mod=score).double()
    q, k, v = torch.randn(3, 1, 2, 9, 2, generator=generator, dtype=torch.float64).unbind(0)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: layer.dense(*x, None), inputs, fast_mode=True)
    for grad in torch.autograd.grad(layer.dense(*inputs, None).sum(), inputs):
        assert grad.isfinite().all()


def test_causal_never_looks_ahead(generator):
    layer, x = make(pattern="causal"), torch.randn(1, 65, 12, generator=generator)
    before = layer(x)
    x[:, 40:] += 5
    torch.testing.assert_close(before[:, :40], layer(x)[:, :40])


@pytest.mark.parametrize("score", ["none", "alibi"])
def test_compiles(score, generator):
    layer = make(20, pattern="causal", score_mod=SCORES[score])
    x = torch.randn(2, 20, 12, generator=generator)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    given = torch.autograd.grad(compiled(x).square().sum(), layer.parameters())
    expected = torch.autograd.grad(layer(x).square().sum(), layer.parameters())
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_meta_and_autocast(generator):
    with torch.device("meta"):
        assert make(20)(torch.empty(2, 20, 12)).shape == (2, 20, 12)
    for score in ("none", "alibi"):
        layer = make(20, score_mod=SCORES[score])
        x = torch.randn(2, 20, 12, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), layer(x), atol=0.03, rtol=0.05)


def test_trains_after_inference_mode(generator):
    layer, x = make(20), torch.randn(2, 20, 12, generator=generator)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.qkv.weight.grad.isfinite().all()


def test_masks_are_made_once_and_few_are_kept(generator):
    calls = []

    def mask_mod(b, h, i, j):
        calls.append(i)
        return j <= i

    layer = make(20, mask_mod=mask_mod)
    for n in (20, 20, *range(1, 12), 11):
        layer(torch.randn(1, n, 12, generator=generator))
    assert len(calls) == 12
    assert len(layer.masks) == module.CACHED


def test_says_once_that_it_is_dense(generator):
    module._say_dense.cache_clear()
    x = torch.randn(1, 20, 12, generator=generator)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        make(20)(x)
        make(20)(x)
    assert ["no backward on cpu" in str(w.message) for w in said] == [True]


@pytest.mark.parametrize(("n", "grid"), [(12, (3, 4)), (12, None), (7, None)])
def test_relative_scores(n, grid, generator):
    """Each pair of tokens gets the entry of its rows and columns apart; the table learns."""
    layer = make(12, grid=grid, pattern="full", score="relative")
    assert not layer.relative.any()
    with torch.no_grad():
        layer.relative.normal_(generator=generator)
    x = torch.randn(2, n, 12, generator=generator)
    q, k, _ = layer.project(x)
    rows, cols = grid or (1, 12)
    scores = q @ k.mT / 2
    for h in range(3):
        for i in range(n):
            for j in range(n):
                (a, b), (c, d) = divmod(i, cols), divmod(j, cols)
                scores[:, h, i, j] += layer.relative[h, c - a + rows - 1, d - b + cols - 1]
    torch.testing.assert_close(layer.attention_matrix(x), scores.softmax(-1))
    flex, dense = both(layer, x)
    torch.testing.assert_close(flex, dense)
    layer(x).square().sum().backward()
    assert layer.relative.grad.any()


def test_a_copy_has_its_own_relative_scores(generator):
    layer = make(12, pattern="full", score="relative")
    x = torch.randn(1, 12, 12, generator=generator)
    before = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            twin.relative.normal_(generator=generator)
        assert not torch.equal(twin(x), before)
        assert torch.equal(layer(x), before)


def test_errors():
    with pytest.raises(ValueError, match="score='swin': choose one of '', 'relative'"):
        make(score="swin")
    with pytest.raises(ValueError, match="give one of the two"):
        make(score="relative", score_mod=SCORES["alibi"])
    with pytest.raises(ValueError, match="66 tokens, and score='relative' has places for 65"):
        make(score="relative")(torch.zeros(1, 66, 12))
    with pytest.raises(ValueError, match="pattern='ring': choose one of full, causal"):
        make(pattern="ring")
    with pytest.raises(ValueError, match="window_size=-2 must be ≥ 0"):
        make(window_size=-2)
    with pytest.raises(ValueError, match="does not divide"):
        make(heads=5)


@pytest.mark.gpu
@pytest.mark.parametrize("score", ["none", "alibi"])
def test_compiled_kernel_is_dense(score, generator):
    """On a GPU: the compiled kernel against the dense path, with gradients."""
    layer = make(200, 48, pattern="window", score_mod=SCORES[score]).cuda()
    x = torch.randn(2, 200, 48, generator=generator).cuda()
    q, k, v = (t.detach().requires_grad_() for t in layer.project(x))
    given, expected = layer.attend(q, k, v, None), layer.dense(q, k, v, None)
    torch.testing.assert_close(given, expected, atol=5e-3, rtol=5e-3)
    grads = (torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (given, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
