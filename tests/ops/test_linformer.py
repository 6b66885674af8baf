"""Linformer against its formula written out, and the order in which the layer multiplies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import LAYOUTS, assert_accurate, layout, outputs_and_gradients
from textbook.linformer import draw, naive
from torch.testing import assert_close

from tab import linformer_attention
from tab.layers import build_attention


@pytest.mark.parametrize("shared", (False, True))
@pytest.mark.parametrize("per_head", (False, True))
@pytest.mark.parametrize("n, h", ((1, 1), (63, 3), (65, 8)))
def test_accuracy(generator, n, h, per_head, shared):
    inputs = draw(generator, n=n, h=h, dv=5, longest=70, per_head=per_head)
    inputs = inputs[:4] if shared else inputs
    assert_accurate(linformer_attention, naive, inputs, names="o dq dk dv dE dF")


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_dtypes(generator, dtype):
    inputs = draw(generator, n=9, h=1, dtype=dtype)
    assert linformer_attention(*inputs).dtype == dtype
    floor = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    assert_accurate(linformer_attention, naive, inputs, floor=floor)


def test_scale_and_mask(generator):
    inputs = draw(generator, n=33)
    mask = torch.rand(2, 33, generator=generator) < 0.6
    options = {"scale": 0.2, "key_mask": mask}
    assert_accurate(
        lambda *x: linformer_attention(*x, **options), lambda *x: naive(*x, **options), inputs
    )


def test_padding_invariance(generator):
    q, k, v, E, F = draw(generator, n=20)
    k[:, :, 12:], v[:, :, 12:] = 1e4, -1e4
    mask = (torch.arange(20) < 12).expand(2, 20)
    padded = linformer_attention(q, k, v, E, F, key_mask=mask)
    short = linformer_attention(q[:, :, :12], k[:, :, :12], v[:, :, :12], E, F)
    assert_close(padded[:, :, :12], short)


def test_batch_and_heads_are_independent(generator):
    q, k, v, E, F = draw(generator)
    before = linformer_attention(q, k, v, E, F)
    k[1, 2] += 1
    after = linformer_attention(q, k, v, E, F)
    changed = torch.zeros(2, 3, dtype=torch.bool)
    changed[1, 2] = True
    assert torch.equal(after[~changed], before[~changed])
    assert not torch.equal(after[changed], before[changed])


@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts(generator, how):
    q, k, v, E, F = draw(generator, n=17)
    inputs = [layout(x, how) for x in (q, k, v)]
    result = outputs_and_gradients(linformer_attention, (*inputs, E, F))
    plain = outputs_and_gradients(linformer_attention, (*(x.contiguous() for x in inputs), E, F))
    for x, y in zip(result, plain, strict=True):
        assert_close(x, y)
    assert result[0].transpose(1, 2).is_contiguous()


def test_gradcheck(generator):
    inputs = draw(generator, b=1, h=2, n=5, d=4, dv=3, rank=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(linformer_attention, leaves)


@settings(max_examples=25)
@given(
    b=st.integers(1, 3), h=st.sampled_from((1, 3, 8)), n=st.integers(1, 40), d=st.integers(1, 9),
    dv=st.integers(1, 9), rank=st.integers(1, 9), more=st.integers(0, 5), per_head=st.booleans(),
)  # fmt: skip
def test_any_shape(b, h, n, d, dv, rank, more, per_head):
    # float64: at rank 1 the softmax is constant, and float32 would compare rounding with rounding.
    options = {"longest": n + more, "per_head": per_head, "dtype": torch.float64}
    inputs = draw(torch.Generator().manual_seed(n), b, h, n, d, dv, rank, **options)
    assert_accurate(linformer_attention, naive, inputs, floor=1e-12)


def test_compile_meta_autocast(generator):
    inputs = draw(generator, n=16)
    compiled = torch.compile(linformer_attention, fullgraph=True, backend="aot_eager")
    assert_close(
        outputs_and_gradients(compiled, inputs), outputs_and_gradients(linformer_attention, inputs)
    )
    assert linformer_attention(*(x.to("meta") for x in inputs)).shape == inputs[2].shape
    with torch.autocast("cpu", torch.bfloat16):
        assert linformer_attention(*inputs).dtype == torch.bfloat16


def test_errors(generator):
    q, k, v, E, F = draw(generator, n=6)
    for bad, words in (
        (lambda: linformer_attention(q, k, v, E[:5]), "N = 6 .*N_max = 5"),
        (lambda: linformer_attention(q, k, v, E, F[:5]), "N = 6 .*N_max = 5"),
        (lambda: linformer_attention(q, k, v, E, F[:, :5]), r"one K ≥ 1.*\(6, 7\).*\(6, 5\)"),
        (lambda: linformer_attention(q, k, v, E[None, None]), r"\(H, N_max, K\)"),
        (lambda: linformer_attention(q, k, v, E.expand(2, 6, 7)), r"\(H, N_max, K\)"),
        (lambda: linformer_attention(q, k, v, E.double()), "one dtype"),
        (lambda: linformer_attention(q[0], k, v, E), r"\(B, H, N, D\)"),
        (lambda: linformer_attention(q, k, v, E, key_mask=torch.ones(2, 5).bool()), r"\(2, 6\)"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()


# --- layer ----------------------------------------------------------------------------------------


def layer(**options):
    torch.manual_seed(0)
    return build_attention("linformer", 24, seq_len=16, num_heads=3, **options)


@pytest.mark.parametrize("k", (2, 16))  # with one E per head, 16 projects W first, 2 x first
@pytest.mark.parametrize("share_heads", (False, True))
@pytest.mark.parametrize("share_kv", (False, True))
def test_layer_is_the_function(generator, share_kv, share_heads, k):
    x = torch.randn(2, 16, 24, generator=generator)
    attention = layer(k=k, share_kv=share_kv, share_heads=share_heads, max_seq_len=20)
    mask = torch.rand(2, 16, generator=generator) < 0.7
    F = attention.E if attention.F is None else attention.F
    assert attention.E.shape == (1 if share_heads else 3, 20, k)
    assert (F is attention.E) == share_kv

    def through_function(x, key_mask=None):
        y = linformer_attention(*attention.project(x), attention.E, F, key_mask=key_mask)
        return attention.out(y.transpose(1, 2).flatten(2))

    assert_close(attention(x), through_function(x))
    assert_close(attention(x, mask)[mask], through_function(x, mask)[mask])
    assert_close(attention(x[:, :9]), through_function(x[:, :9]))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), attention(x))
    attention(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in attention.parameters())


@pytest.mark.parametrize(
    "share_heads, k, first", ((True, 2, "x"), (False, 2, "x"), (False, 16, "W"))
)
def test_layer_projects_the_cheaper_way(share_heads, k, first):
    attention = layer(share_heads=share_heads, k=k)
    with torch.profiler.profile(record_shapes=True) as profile:
        attention(torch.randn(2, 16, 24))
    shapes = [e.input_shapes for e in profile.events() if e.name == "aten::linear"]
    tokens = [s[0][1] for s in shapes if len(s[0]) == 3]
    # q, and the output; k and v over N = 16 tokens only where W goes first.
    assert tokens.count(16) == (4 if first == "W" else 2)


def test_attention_matrix(generator):
    """What is shown is |a|, rows normalised, of the a with o = a v."""
    x = torch.randn(2, 16, 24, generator=generator)
    for options in ({}, {"share_kv": False, "share_heads": False, "k": 5}):
        attention = layer(**options)
        matrix = attention.attention_matrix(x)
        assert_close(matrix.sum(-1), torch.ones(2, 3, 16))
        q, k, _ = attention.project(x)
        units = torch.eye(16).expand(2, 3, 16, 16)
        F = attention.E if attention.F is None else attention.F
        a = linformer_attention(q, k, units, attention.E, F).abs()
        assert_close(matrix, a / a.sum(-1, keepdim=True))


def test_layer_errors():
    for options, words in (
        ({"k": 17}, "max_seq_len=16.*nearest choice: k=16"),
        ({"k": 0}, "nearest choice: k=1"),
        ({"max_seq_len": 15}, "max_seq_len=15.*seq_len=16"),
    ):
        with pytest.raises(ValueError, match=words):
            layer(**options)
    with pytest.raises(ValueError, match=r"N = 17.*max_seq_len=16"):
        layer()(torch.randn(1, 17, 24))
    assert layer().E.shape == (1, 16, 4)
