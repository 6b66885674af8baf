"""Ops without the state: what the public functions call where nobody asks for one."""

import pytest
import torch
from backends import needs_cpp
from proof import poisoned
from tasks import threads
from torch._dynamo.backends.debugging import aot_eager
from torch.profiler import ProfilerActivity, profile

import tab
from tab.ops import OPS, gated_linear
from tab.ops._check import accumulate

W = tab.orthogonal_projection(12, 8, generator=torch.Generator().manual_seed(0))


def draw(grouped=False):
    generator = torch.Generator().manual_seed(0)
    heads = 4, 2 if grouped else 4
    q, k, v, g = (
        torch.randn(2, h, 9, size, generator=generator)
        for h, size in ((heads[0], 8), (heads[1], 8), (heads[1], 5), (heads[1], 1))
    )
    return q, k, v, -g[..., 0].abs()


def linear(q, k, v, g=None, **options):
    return tab.linear_attention(q, k, v, **options)


def performer(q, k, v, g=None, **options):
    return tab.performer_attention(q, k, v, W.to(accumulate(q)), **options)


CALLS = {
    "linear": linear,
    "linear, causal": lambda *x, **options: linear(*x, causal=True, **options),
    "gated_linear": tab.gated_linear_attention,
    "gated_linear, normalized": lambda *x, **options: tab.gated_linear_attention(
        *(y.exp() for y in x[:3]), x[3], normalize=True, **options
    ),
    "performer": performer,
    "performer, causal": lambda *x, **options: performer(*x, causal=True, **options),
}


def used(name, x):
    """What of q, k, v and g the op reads."""
    return x[: 4 if "gated" in name else 3]


def called(name, monkeypatch) -> list[str]:
    """The names of the ops that run from now on; those of normalized attention as on a GPU."""
    names = []
    if "normalized" in name:
        monkeypatch.setattr(gated_linear, "_in_kernels", lambda *x: True)
    for each, op in OPS.items():
        below = op.below
        monkeypatch.setattr(
            op, "below", lambda *x, below=below, each=each: names.append(each) or below(*x)
        )
    return names


def asked(f, state, **options):
    """f, and whether the state is asked for beside its output."""

    def run(*x):
        found = f(*x, return_state=state, **options)
        return found[0] if state else found

    return run


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("grouped", [False, True])
def test_the_same_numbers_and_gradients(name, grouped, backend, monkeypatch):
    x, results = [y.double() for y in draw(grouped)], []
    names = called(name, monkeypatch)
    for state in (True, False):
        names.clear()
        f = asked(CALLS[name], state, backend=backend)
        leaves = [y.clone().requires_grad_() for y in x]
        wanted = used(name, leaves)
        plain, o = f(*x), f(*leaves)
        once = torch.autograd.grad(o.sin().sum(), wanted)
        first = torch.autograd.grad(f(*leaves).sin().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(y.sin().sum() for y in first), wanted)
        results.append([plain, o, *once, *first, *second])
        op = name.replace(", ", "_").removesuffix("_causal")
        assert (f"{op}_stateless_fwd" in names) is not state
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


on_cpu = pytest.mark.parametrize("name", [name for name in CALLS if "normalized" not in name])


@needs_cpp("linear_fwd")
@pytest.mark.each_isa
@on_cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [9, 700])  # by heads, and segments of one sequence
def test_the_same_bits_on_a_cpu(name, dtype, tokens):
    x, results = [y[:1, :1].repeat(1, 1, -(-tokens // 9), 1) for y in draw()[:3]], []
    x = [*(y.to(dtype) for y in x), -torch.rand(1)]
    for state in (True, False):
        f = asked(CALLS[name], state, backend="cpp")
        leaves = [y.clone().requires_grad_() for y in x]
        with poisoned(), threads(5):
            o = f(*leaves)
            results.append([f(*x), o, *torch.autograd.grad(o.sin().sum(), used(name, leaves))])
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_who_asks_for_the_state_gets_it(name, monkeypatch):
    x, f = draw(), CALLS[name]
    o, state = f(*x, return_state=True)
    called(name, monkeypatch)
    got, after = f(*x, return_state=True)
    torch.testing.assert_close((got, after), (o, state))
    leaves = [y.clone().requires_grad_() for y in x]
    o, state = f(*leaves, return_state=True)
    states = state if isinstance(state, tuple) else (state,)
    grads = torch.autograd.grad(sum(y.sin().sum() for y in (o, *states)), used(name, leaves))
    again = f(*leaves, initial_state=tuple(y.detach() for y in states) if len(states) > 1 else
              states[0].detach())  # fmt: skip
    assert again.isfinite().all() and all(y.isfinite().all() for y in grads)


def allocated(f) -> int:
    """Bytes of all tensors that f asks memory for."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        f()
    return sum(max(event.self_cpu_memory_usage, 0) for event in found.events())


@needs_cpp("linear_fwd")
@on_cpu
def test_on_a_cpu_there_is_no_room_for_what_nobody_asks_for(name):
    x, f = draw(), CALLS[name]
    with torch.no_grad():
        state = f(*x, return_state=True)[1]
        states = state if isinstance(state, tuple) else (state,)
        size = sum(y.nbytes for y in states)
        more = allocated(lambda: f(*x, return_state=True))
        assert more - allocated(lambda: f(*x)) == size
    first = tuple(y.detach().requires_grad_() for y in states)
    leaves = [y.clone().requires_grad_() for y in used(name, x)]
    rest = x[len(leaves) :]

    def backward(*options):
        o = f(*leaves, *rest, **options[0]) if options else f(*leaves, *rest)
        return allocated(lambda: torch.autograd.grad(o, leaves, torch.ones_like(o)))

    given = {"initial_state": first if len(first) > 1 else first[0]}
    assert backward(given) - backward() >= size


@pytest.mark.parametrize(
    ("op", "way"),
    [("linear", "fwd"), ("linear", "bwd"), ("gated_linear", "fwd"), ("gated_linear", "bwd"),
     ("performer", "fwd")],
)  # fmt: skip
def test_to_pytorch_it_is_an_op_like_others(op, way):
    q, k, v, g = draw()
    s, z = torch.randn(2, 4, 8, 5), torch.rand(2, 4, 8) + 1
    given = {"linear": (q, k, v), "gated_linear": (q, k, v, g[..., None])}.get(op, (q, k, v, W))
    more, options = (None,) * (2 if op == "gated_linear" else 3), (0.3,)
    if op != "gated_linear":
        options = 0, False, 0.1
    if op == "performer":
        more = None, None, None, None
    if way == "bwd":
        given = (v, None, None, *given, v, s, z) if op == "linear" else (v, None, *given)
    else:
        given = tuple(x if x is W else x.clone().requires_grad_() for x in given)
    torch.library.opcheck(OPS[f"{op}_stateless_{way}"].overload, (*given, *more, *options))


@pytest.mark.parametrize("name", ["linear", "gated_linear", "performer"])
@pytest.mark.parametrize("train", [False, True])
def test_compiled(name, train):
    """One graph, with the op in it."""
    x, f = draw(), CALLS[name]
    leaves = [y.clone().requires_grad_(train) for y in used(name, x)]
    rest = x[len(leaves) :]
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs)

    compiled = torch.compile(f, fullgraph=True, backend=backend)
    o, wanted = compiled(*leaves, *rest), f(*leaves, *rest)
    torch.testing.assert_close(o, wanted)
    assert any(f"{name}_stateless_fwd" in target for target in seen)
    if train:
        pairs = (torch.autograd.grad(y.sin().sum(), leaves) for y in (o, wanted))
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b)
