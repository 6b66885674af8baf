"""MLA: every form against the textbook formula, decode against the forward, and their errors."""

import pytest
import torch
from backends import needs_cpp
from proof import LAYOUTS, assert_accurate, outputs_and_gradients
from textbook.mla import NAMES, named, operands, ours, textbook

from tab import use_backend
from tab.functional import mla_attention
from tab.ops import mla
from tab.ops.mla import mla_bwd, mla_fwd

# The fused form is its reference; "cpp" is the fused form in C++.
FORMS = ("fused", "expand", "absorb", pytest.param("cpp", marks=needs_cpp("mla_fwd")))
SIZES = [  # B, H, N, Dn, Dr, R, Dv
    (2, 1, 1, 4, 2, 3, 5),
    (2, 3, 63, 5, 4, 7, 6),
    (1, 8, 65, 16, 8, 24, 16),
    (3, 2, 130, 33, 16, 40, 17),
]


@pytest.mark.each_isa
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_accurate(form, causal, size, generator):
    assert_accurate(
        ours(form, causal=causal), textbook(causal), operands(size, generator), names=NAMES
    )


@pytest.mark.parametrize("form", FORMS)
def test_without_rotary_part(form, generator):
    qn, _, c, _, uk, uv = operands((2, 2, 9, 8, 1, 6, 3), generator)

    def without(f):
        return lambda qn, c, uk, uv: f(qn, qn[..., :0], c, c[..., :0], uk, uv)

    assert_accurate(
        without(ours(form)), without(textbook()), [qn, c, uk, uv], names="o lse dq dc duk duv"
    )


@pytest.mark.each_isa
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(form, dtype, generator):
    x = operands((2, 3, 9, 8, 4, 8, 8), generator, dtype)
    assert_accurate(ours(form, causal=True), textbook(True), x, names=NAMES)
    o, lse = ours(form)(*x)
    assert o.dtype == dtype
    assert lse.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts(form, how, generator):
    x = operands((2, 3, 17, 8, 4, 8, 8), generator, torch.float64, how)
    assert how == "contiguous" or not x[0].is_contiguous()
    f, g = ours(form, scale=0.3), textbook(scale=0.3)
    for given, truth in zip(outputs_and_gradients(f, x), outputs_and_gradients(g, x), strict=True):
        torch.testing.assert_close(given, truth)


@pytest.mark.parametrize("form", FORMS)
def test_without_lse(form, generator):
    """SDPA instead of written scores: the same function."""
    x = operands((2, 3, 33, 8, 4, 8, 8), generator)
    mask = torch.rand(2, 33, generator=generator) < 0.7
    mask[:, 0] = True  # the textbook softmax has no answer for a row that sees nothing
    for options in ({}, {"causal": True}, {"causal": True, "key_mask": mask}):

        def short(*x, options=options):
            return mla_attention(*x, **named(form, **options))

        def long(*x, options=options):
            return textbook(**options)(*x)[0]

        assert_accurate(short, long, x, names=NAMES.replace("lse ", ""))


@pytest.mark.parametrize("form", FORMS)
def test_key_mask_is_removal(form, generator):
    """Masked tokens act as if they were not there, and receive no gradient."""
    x = operands((1, 2, 12, 4, 2, 6, 4), generator, torch.float64)
    mask = torch.arange(12) < 7
    masked = outputs_and_gradients(ours(form, key_mask=mask[None]), x)
    cut = [t[:, :, :7] if t.dim() == 4 else t[:, :7] if i < 4 else t for i, t in enumerate(x)]
    short = ours(form)(*cut)
    torch.testing.assert_close(masked[0][:, :, :7], short[0])
    torch.testing.assert_close(masked[1][:, :, :7], short[1])
    assert masked[4][:, 7:].abs().max() == 0  # dc_kv
    assert masked[5][:, 7:].abs().max() == 0  # dk_rope


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lse", [True, False])
def test_a_query_that_sees_nothing(form, lse, generator):
    x = operands((2, 2, 5, 4, 2, 6, 4), generator)
    mask = torch.tensor([[False] * 5, [True] * 5])

    def f(*x):
        out = mla_attention(*x, **named(form), key_mask=mask, return_lse=lse)
        return out[0] if lse else out

    o, *grads = outputs_and_gradients(f, x)
    assert (o[0] == 0).all()
    assert (o[1] != 0).any()
    assert all(g.isfinite().all() for g in grads)
    assert grads[2][0].abs().max() == 0  # dc_kv of the sequence that saw nothing
    if lse:
        assert (ours(form, key_mask=mask)(*x)[1][0] == -torch.inf).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [False, True])
def test_max_logits(form, causal, generator):
    """max_logits against the largest score a textbook softmax takes in; N over one chunk of it."""
    x = operands((2, 3, 300, 4, 2, 6, 4), generator, torch.float64)
    mask = torch.rand(2, 300, generator=generator) < 0.5
    o, peak = mla_attention(*x, **named(form), causal=causal, key_mask=mask, return_max_logits=True)
    qn, qr, c, kr, uk, _ = x
    s = (qn @ (c[:, None] @ uk.mT).mT + qr @ kr[:, None].mT) * 6**-0.5
    s = s.masked_fill(~(mask[:, None, None] & mask[:, None, :, None]), -torch.inf)
    s = s.masked_fill(torch.ones(300, 300).triu(1).bool(), -torch.inf) if causal else s
    torch.testing.assert_close(peak, s.amax((-2, -1)))
    both = mla_attention(
        *x, **named(form), causal=causal, key_mask=mask, return_lse=True, return_max_logits=True
    )
    torch.testing.assert_close(both[0], o)
    torch.testing.assert_close(both[2], peak)
    assert not peak.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_causal_hides_the_future(form, generator):
    x = operands((2, 2, 20, 4, 2, 6, 4), generator)
    later = [t.clone() for t in x]
    for t in later[:4]:
        t[..., 13:, :] += 5
    f = ours(form, causal=True)
    before, after = f(*x)[0], f(*later)[0]
    assert torch.equal(before[:, :, :13], after[:, :, :13])
    assert not torch.allclose(before[:, :, 13:], after[:, :, 13:])


@pytest.mark.parametrize("form", FORMS)
def test_batch_entries_do_not_meet(form, generator):
    x = operands((3, 2, 9, 4, 2, 6, 4), generator, torch.float64)
    one = [t[1:2] if i < 4 else t for i, t in enumerate(x)]
    torch.testing.assert_close(ours(form)(*x)[0][1:2], ours(form)(*one)[0])


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, generator):
    x = [t.requires_grad_() for t in operands((2, 2, 3, 2, 2, 2, 2), generator, torch.float64)]
    mask = torch.tensor([[True, False, True], [True] * 3])
    assert torch.autograd.gradcheck(ours(form, causal=True, key_mask=mask), x)


@pytest.mark.parametrize("form", [*FORMS, "auto"])
def test_meta_compile_autocast(form, generator):
    x = operands((2, 3, 9, 8, 4, 8, 6), generator)
    mask = torch.rand(2, 9, generator=generator) < 0.9
    mask[:, 0] = True

    def f(*x):
        return mla_attention(
            *x, causal=True, key_mask=mask, **named(form), return_lse=True, return_max_logits=True
        )[:2]

    eager = outputs_and_gradients(f, x)
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_gradients(compiled, x), eager, strict=True):
        torch.testing.assert_close(a, b)
    out = mla_attention(*(t.to("meta") for t in x), **named(form))
    assert out.shape == eager[0].shape
    assert out.stride() == eager[0].stride()
    with torch.autocast("cpu", torch.bfloat16):
        o, lse = f(x[0].bfloat16(), *x[1:])  # a mixture, as autocast makes them
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(o.float(), eager[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_token_major(form, generator):
    x = operands((2, 3, 9, 8, 4, 8, 6), generator)
    o, _, dqn, dqr, *_ = outputs_and_gradients(ours(form), x)
    assert o.transpose(1, 2).is_contiguous()
    if form in ("fused", "cpp"):
        assert dqn.transpose(1, 2).is_contiguous()
        assert dqr.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked, generator):
    x = operands((2, 3, 9, 8, 4, 8, 6), generator)
    mask = torch.arange(9).expand(2, 9) < 7 if masked else None
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(mla_fwd.overload, (*x, mask, 0.3, True), test_utils=tests)
    o, lse, _ = mla_fwd("auto", *x, mask, 0.3, True)
    do, dlse = torch.randn(o.shape, generator=generator), lse if masked else None
    torch.library.opcheck(
        mla_bwd.overload, (do, dlse, *x, o, lse, mask, 0.3, True), test_utils=tests[:2]
    )


def test_which_form_auto_is(generator, monkeypatch):
    short_n = mla.FUSED_TOKENS["cpu"]
    q = operands((1, 1, short_n + 1, 2, 2, 2, 2), generator)[0]
    for compiled, short in ((True, "fused"), (False, "expand")):
        monkeypatch.setattr(mla, "_compiled", lambda device, answer=compiled: answer)
        assert mla._choose_form("auto", "auto", [q[:, :, :short_n]], False) == (short, "auto")
        assert mla._choose_form("auto", "auto", [q], False) == ("expand", "auto")
        assert mla._choose_form("auto", "auto", [q], True) == (short, "auto")
        assert mla._choose_form("auto", "reference", [q], False) == ("fused", "reference")
    with use_backend("reference"):
        assert mla._choose_form("auto", "auto", [q], False) == ("fused", "reference")


def test_reference_by_name_is_full_precision_under_autocast(generator):
    x = operands((2, 3, 9, 8, 4, 8, 6), generator, torch.bfloat16)
    truth = outputs_and_gradients(ours("fused", backend="reference"), x)
    with torch.autocast("cpu", torch.bfloat16):
        given = outputs_and_gradients(ours("fused", backend="reference"), x)
        assert all(torch.equal(a, b) for a, b in zip(given, truth, strict=True))
        other = outputs_and_gradients(ours("fused", backend="auto"), x)
    for a, b in zip(other, truth, strict=True):  # C++ where it is built
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({0: torch.zeros(2, 9, 8)}, r"q_nope \(2, 9, 8\)"),
        ({2: torch.zeros(2, 8, 8)}, r"c_kv \(2, 9, 8\) to fit.*c_kv \(2, 8, 8\)"),
        ({3: torch.zeros(2, 9, 5)}, r"k_rope \(2, 9, 4\) to fit"),
        ({4: torch.zeros(3, 7, 8)}, r"w_uk \(3, 8, 8\) to fit"),
        ({5: torch.zeros(2, 6, 8)}, r"w_uv \(3, 6, 8\) to fit"),
        ({5: torch.zeros(3, 6, 8).double()}, r"one dtype.*float64"),
        ({4: torch.zeros(3, 8, 8, device="meta")}, r"one device.*meta"),
        ({5: torch.zeros(3, 0, 8)}, r"no empty dimension"),
    ],
)
def test_bad_tensors(change, says, generator):
    x = operands((2, 3, 9, 8, 4, 8, 6), generator)
    for i, t in change.items():
        x[i] = t
    with pytest.raises(ValueError, match=f"mla_attention wants .*{says}"):
        mla_attention(*x)


def test_bad_options(generator):
    x = operands((2, 3, 9, 8, 4, 8, 6), generator)
    with pytest.raises(ValueError, match="form='absorbed': choose one of auto, fused"):
        mla_attention(*x, form="absorbed")
    with pytest.raises(ValueError, match="form='expand' is a composition"):
        mla_attention(*x, form="expand", backend="cpp")
    with pytest.raises(ValueError, match=r"key_mask \(B, N\) = \(2, 9\) bool"):
        mla_attention(*x, key_mask=torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="backend='fast'"):
        mla_attention(*x, backend="fast")
    with pytest.raises(RuntimeError, match="runs on cuda tensors"):
        mla_attention(*x, backend="triton")
