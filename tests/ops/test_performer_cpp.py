"""What only the C++ kernels of performer could get wrong: tiles, panels, segments, memory."""

import pytest
import torch
from backends import needs_cpp
from proof import LAYOUTS, assert_accurate, layout, outputs_and_gradients, poisoned
from tasks import threads
from textbook.performer import KERNELS, call, draw, exact, naive
from torch.testing import assert_close

from tab import performer_attention
from tab.ops import OPS

pytestmark = needs_cpp("performer_fwd")
NAMES = "o S z dq dk dv dS₀ dz₀"


def mask(generator, b, n):
    keep = torch.rand(b, n, generator=generator) > 0.3
    keep[:, n // 2] = True
    return keep


def check(x, w, kernel, c0, *, floor=5e-6, **options):
    """Outputs, state and all gradients against sums without shifts, in float64."""
    m = w.shape[0]

    def f(q, k, v, s0=None, z0=None):
        acc = torch.promote_types(q.dtype, torch.float32)
        state = None if s0 is None else (s0, z0, c0.to(acc))
        o, (s, z, c) = performer_attention(
            q, k, v, w.to(acc), kernel=kernel, initial_state=state, return_state=True,
            backend="cpp", **options,
        )  # fmt: skip
        seen = c.exp() if kernel == "softmax" else torch.ones_like(c)
        return o, s * seen[..., None], z * seen

    def truth(q, k, v, s0=None, z0=None):
        acc, root = torch.promote_types(q.dtype, torch.float32), m**0.5
        if s0 is not None:
            e = c0.to(acc).exp() / root if kernel == "softmax" else torch.full_like(z0, 1 / root)
            s0, z0 = s0 * e[..., None], z0 * e
        o, s, z = naive(q, k, v, s0, z0, w=w, kernel=kernel, **options)
        return o, s.to(acc) * root, z.to(acc) * root

    assert_accurate(f, truth, x, floor=floor, names=NAMES)


@pytest.mark.each_isa
@pytest.mark.parametrize("state", (False, True))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("b", "h", "n", "d", "dv", "m"),
    [
        (1, 1, 1, 8, 8, 32),
        (3, 1, 63, 16, 5, 100),
        (1, 8, 65, 32, 64, 64),
        (1, 3, 40, 33, 40, 257),
        (1, 1, 700, 12, 17, 48),  # segments of one sequence
        (1, 1, 33, 256, 129, 40),
    ],
)
def test_shapes(generator, b, h, n, d, dv, m, kernel, causal, state):
    q, k, v, w = draw(generator, b=b, h=h, n=n, d=d, dv=dv, m=m, scale=0.5)
    x = [q, k, v]
    if state:
        x += [torch.randn(b, h, m, dv, generator=generator)]
        x += [torch.rand(b, h, m, generator=generator) + 0.1]
    c0 = torch.randn(b, h, m, generator=generator)
    keep = mask(generator, b, n)
    if not state and causal:
        keep[:, 0] = True  # the textbook's first row would be 0/0
    # A denominator of few relu features may be small.
    floor = 5e-6 if kernel == "softmax" else 5e-5
    check(x, w, kernel, c0, causal=causal, key_mask=keep, floor=floor)


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("causal", (False, True))
def test_dtypes_in_place(generator, dtype, how, causal):
    q, k, v, w = draw(generator, n=37, d=20, dv=28, m=40, dtype=dtype, scale=0.5)
    floor = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    assert_accurate(
        call(w, causal=causal, backend="cpp"),
        lambda q, k, v: naive(q, k, v, w=w, causal=causal)[0],
        [layout(x, how) for x in (q, k, v)],
        floor=floor,
        names="o dq dk dv",
    )


@pytest.mark.parametrize("number", (1, 3))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("h", (1, 4))
def test_gradients_where_shifts_move(generator, causal, number, h):
    """Exponents that rise or fall by thousands: tiles end early, states move far."""
    q, k, v, w = draw(generator, b=1, h=h, n=300, m=20, dtype=torch.float64)
    k[:, :, :150] *= torch.linspace(60, 0, 150, dtype=torch.float64)[:, None]
    q[:, :, ::7] *= 30
    with threads(number):
        given = outputs_and_gradients(call(w, causal=causal, backend="cpp"), (q, k, v))
    truth = outputs_and_gradients(lambda q, k, v: exact(q, k, v, w, causal), (q, k, v))
    for x, y in zip(given, truth, strict=True):
        assert_close(x, y, rtol=1e-9, atol=1e-9 * y.abs().max().item())


@pytest.mark.each_isa
@pytest.mark.parametrize("causal", (False, True))
def test_agrees_with_the_reference(generator, causal):
    """All outputs as they are, shifts and log-sum-exp too, with ε, a mask and a state."""
    q, k, v, w = draw(generator, n=70, m=40, dtype=torch.float64)
    first = torch.randn(2, 3, 40, 8).double(), torch.rand(2, 3, 40).double(), torch.randn(2, 3, 40)
    first = *first[:2], first[2].double()
    keep = mask(generator, 2, 70)
    saved = {}
    for state in ((None,) * 3, first, (*(x * 0 for x in first[:2]), first[2] - torch.inf)):
        for kernel in (0, 1):
            for backend in ("reference", "cpp"):
                out = OPS["performer_fwd"](backend, q, k, v, w, keep, *state, kernel, causal, 0.3)
                do, ds, dz = (torch.sin(x * 50) for x in out[:3])
                saved[backend] = out + OPS["performer_bwd"](
                    backend, do, ds, dz, q, k, v, w, *out, keep, *state, kernel, causal
                )
            if kernel == 1 and state[0] is not None and state[2].isinf().all():
                continue  # relu states have no shift
            for x, y in zip(saved["cpp"], saved["reference"], strict=True):
                assert_close(x, y, rtol=1e-9, atol=1e-9)
                assert x.stride() == y.stride()


@pytest.mark.parametrize("dv", [64, 61])  # rows that begin on a whole vector, and that do not
def test_large_states_go_past_the_caches(dv, generator):
    """What 2²¹ numbers and more are written by is another loop: the same bits."""
    b = 2 * (1 + (1 << 20) // (256 * dv))
    *x, w = draw(generator, b=b, h=1, n=2, dv=dv, m=256)
    x += torch.rand(b, 1, 256, dv, generator=generator), torch.rand(b, 1, 256, generator=generator)

    def run(rows):
        leaves = [t[rows].requires_grad_() for t in x]
        shift = torch.zeros_like(leaves[-1])
        found = performer_attention(
            *leaves[:3], w, initial_state=(*leaves[3:], shift), return_state=True, backend="cpp"
        )
        return found[0], *found[1], *torch.autograd.grad(found[0].square().sum(), leaves)

    with poisoned():
        whole, one, other = (run(rows) for rows in (slice(b), slice(b // 2), slice(b // 2, b)))
    for i, j, k in zip(whole, one, other, strict=True):
        assert torch.equal(i, torch.cat([j, k]))


def test_op_guards_its_memory(generator):
    q, k, v, w = draw(generator, n=9)
    state = torch.zeros(2, 3, 12, 8), torch.zeros(2, 3, 12), torch.zeros(2, 3, 12)
    run = OPS["performer_fwd"].overload
    for args, words in (
        ((q, k[:, :, :3], v, w, None, *(None,) * 3), "v has the wrong shape"),
        ((q, k, v.double(), w, None, *(None,) * 3), "v has the wrong dtype"),
        ((q, k, v, w[:, :3], None, *(None,) * 3), "projection has the wrong shape"),
        ((q, k, v, w.double(), None, *(None,) * 3), "projection has the wrong dtype"),
        ((q, k, v, w, torch.ones(2, 8).bool(), *(None,) * 3), "key_mask has the wrong shape"),
        ((q, k, v, w, None, state[0], None, None), "come together"),
        ((q, k, v, w, None, *state[:2], None), "come together"),
        ((q, k, v, w, None, *state[:2], state[2][:1]), "c has the wrong shape"),
    ):
        with pytest.raises(RuntimeError, match=words):
            run(*args, 0, False, 0.0)
