"""key_mask of local and sparse attention: who is masked is seen by nobody, whatever it holds."""

import pytest
import torch
from proof import assert_accurate
from softmax_cases import NAMES, masks, qkv, seen_lse, sees, softmax_op, where
from tasks import threads
from textbook.softmax import ruled
from torch._dynamo.testing import CompileCounterWithBackend

from tab import BlockPattern, local_attention, sparse_attention

N = 76  # 19 rows of 4 on a grid; the last block of 8 is ragged


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "backend"), where(*NAMES))
def test_against_the_textbook(name, backend, dtype):
    """o, L and the gradients through both; then with two heads of k and v."""
    x = [t.to(dtype) for t in qkv(N, b=4, h=4, d=12, dv=8)]
    call = seen_lse(softmax_op(name, backend, N, key_mask=masks(N), return_lse=True))
    truth = ruled(sees(name, N), key_mask=masks(N))
    assert_accurate(call, truth, x, names="o lse dq dk dv")
    x[1:] = (t[:, ::2] for t in x[1:])
    assert_accurate(lambda *x: call(*x)[0], lambda *x: truth(*x)[0], x, names="o dq dk dv")


@pytest.mark.each_isa
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("mask", [0, 1, 2, 3])
@pytest.mark.parametrize(("_", "backend"), where("long", backends=("cpp",)))
def test_long_lists_of_keys(_, backend, mask, workers):
    """Several chunks of keys to a strip, and the strips of a head shared by threads."""
    n = 1500
    x, key_mask = qkv(n, b=1, h=1, d=16, dv=16), masks(n)[mask : mask + 1]
    near = (torch.arange(n) - torch.arange(n)[:, None]).abs() <= 700
    blocks = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) < 0.6
    pattern = BlockPattern.from_blocks(blocks, 128, n)
    options = {"key_mask": key_mask, "backend": backend}
    with threads(workers):
        for call, seen in (
            (lambda *x: local_attention(*x, window=700, **options), near),
            (lambda *x: sparse_attention(*x, pattern, **options), pattern.to_dense()[0]),
        ):
            truth = ruled(seen, key_mask=key_mask)
            assert_accurate(call, lambda *x, f=truth: f(*x)[0], x, names="o dq dk dv")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("through", ["o", "lse", "sinks"])
@pytest.mark.parametrize(("name", "backend"), where(*NAMES))
def test_what_a_masked_token_holds(name, backend, through, value):
    """In q, k and v at once: the outputs of real tokens, and all gradients, are as without it."""
    mask, results = masks(N), []
    sinks = torch.tensor([0.3, -0.5], requires_grad=True)
    extra = {"lse": {"return_lse": True}, "sinks": {"sinks": sinks}}.get(through, {})
    call = softmax_op(name, backend, N, key_mask=mask, **extra)
    for dirty in (False, True):
        x = [t.requires_grad_() for t in qkv(N, b=4)]
        leaves = [*x, *([sinks] if through == "sinks" else [])]
        if dirty:
            x = [t.masked_fill(~mask[:, None, :, None], value) for t in x]
        out = call(*x)
        o = (out[1][..., None] if through == "lse" else out).transpose(1, 2)[mask]
        o = o[o.isfinite()]
        results.append((o, *torch.autograd.grad(o.square().sum(), leaves)))
    hidden = ~mask[:, None, :, None].expand_as(results[0][2])
    assert not any(t[hidden].any() for t in results[0][2:4])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_any_order(name):
    x = [t.requires_grad_() for t in qkv(12, b=4, d=2, dv=2, dtype=torch.float64)]
    call = softmax_op(name, "auto", 12, key_mask=masks(12))
    assert torch.autograd.gradcheck(call, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, x, fast_mode=True)


@pytest.mark.parametrize(("name", "backend"), where("line", "blocks"))
def test_nobody_hidden_is_no_mask(name, backend):
    """And neither are its strides, or those of q, k and v."""
    x = qkv(N, b=4)
    plain = softmax_op(name, backend, N)(*x)
    everybody = torch.ones(1, 1, dtype=torch.bool).expand(4, N)
    torch.testing.assert_close(softmax_op(name, backend, N, key_mask=everybody)(*x), plain)
    mask = torch.stack([masks(N), masks(N)], -1)[..., 0]
    turned = [t.transpose(1, 2).contiguous() for t in x]
    o = softmax_op(name, backend, N, key_mask=mask, layout="bnhd")(*turned)
    want = softmax_op(name, backend, N, key_mask=mask.contiguous())(*x)
    torch.testing.assert_close(o.transpose(1, 2), want)


@pytest.mark.parametrize("name", ["line", "causal blocks"])
def test_compiled_and_exported(name):
    op = softmax_op(name, "auto", N)  # with its pattern, which is made before

    class Masked(torch.nn.Module):
        def forward(self, q, k, v, mask):
            return op(q, k, v, key_mask=mask)

    x = [*qkv(N, b=4), masks(N)]
    want = Masked()(*x)
    torch.testing.assert_close(torch.export.export(Masked(), tuple(x)).module()(*x), want)
    leaves = [t.requires_grad_() for t in x[:3]]
    compiled = torch.compile(Masked(), backend="aot_eager", fullgraph=True)
    got, grads = (
        torch.autograd.grad(f(*leaves, masks(N)).square().sum(), leaves)
        for f in (compiled, Masked())
    )
    torch.testing.assert_close(got, grads)


def test_no_compilation_for_every_length():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def call(q, k, v, mask, alibi):
        options = {"key_mask": mask, "softcap": 5.0, "alibi": alibi, "sinks": alibi}
        return local_attention(q, k, v, window=3, **options)

    for n in (20, 33, 47):
        call(*qkv(n, b=4), masks(n), torch.ones(2))
    assert counter.frame_count == 1


def test_bad_masks():
    q, k, v = qkv(N, b=4)
    for bad in (masks(N).float(), masks(N)[:3], masks(N)[:, :9], masks(N).to("meta")):
        for name in ("line", "blocks"):
            with pytest.raises(ValueError, match=r"key_mask \(B, N\) = \(4, 76\) bool|one device"):
                softmax_op(name, "auto", N, key_mask=bad)(q, k, v)
