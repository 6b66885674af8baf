"""Ops without the state: what the public functions call on a GPU where nobody asks for one."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

import tab
from tab.ops import OPS, gated_linear, linear


def draw(grouped=False):
    generator = torch.Generator().manual_seed(0)
    heads = 4, 2 if grouped else 4
    q, k, v, g = (
        torch.randn(2, h, 9, size, generator=generator)
        for h, size in ((heads[0], 8), (heads[1], 8), (heads[1], 5), (heads[1], 1))
    )
    return q, k, v, -g[..., 0].abs()


CALLS = {
    "linear": lambda q, k, v, _, **options: tab.linear_attention(q, k, v, **options),
    "linear, causal": lambda q, k, v, _, **options: tab.linear_attention(
        q, k, v, causal=True, **options
    ),
    "gated_linear": tab.gated_linear_attention,
    "gated_linear, normalized": lambda *x, **options: tab.gated_linear_attention(
        *(y.exp() for y in x[:3]), x[3], normalize=True, **options
    ),
}


def called(module, monkeypatch) -> list[str]:
    """The names of the ops that run from now on, with a CPU taken for a GPU."""
    names = []
    monkeypatch.setattr(module, "spares", lambda x: True)
    if module is gated_linear:
        monkeypatch.setattr(module, "_in_kernels", lambda *x: True)
    for name, op in OPS.items():
        if "linear" in name:
            below = op.below
            monkeypatch.setattr(
                op, "below", lambda *x, below=below, name=name: names.append(name) or below(*x)
            )
    return names


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("grouped", [False, True])
def test_the_same_numbers_and_gradients(name, grouped, monkeypatch):
    x, f = [y.double() for y in draw(grouped)], CALLS[name]
    results = []
    for spare in (False, True):
        if spare:
            module = gated_linear if "gated" in name else linear
            names = called(module, monkeypatch)
        leaves = [y.clone().requires_grad_() for y in x]
        plain = f(*x)
        o = f(*leaves)
        used = leaves[: 4 if "gated" in name else 3]
        first = torch.autograd.grad(o.sin().sum(), used, create_graph=True)
        second = torch.autograd.grad(sum(y.sin().sum() for y in first), used)
        o = f(*leaves)
        once = torch.autograd.grad(o.sin().sum(), used)
        results.append([plain, o, *first, *once, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    op = name.replace(", ", "_").removesuffix("_causal")
    assert {f"{op}_stateless_fwd", f"{op}_stateless_bwd"} <= {*names}


@pytest.mark.parametrize("name", CALLS)
def test_who_asks_for_the_state_gets_it(name, monkeypatch):
    x, f = draw(), CALLS[name]
    module = gated_linear if "gated" in name else linear
    o, state = f(*x, return_state=True)
    called(module, monkeypatch)
    got, after = f(*x, return_state=True)
    torch.testing.assert_close((got, after), (o, state))
    leaves = [y.clone().requires_grad_() for y in x]
    o, state = f(*leaves, return_state=True)
    states = state if isinstance(state, tuple) else (state,)
    grads = torch.autograd.grad(sum(y.sin().sum() for y in (o, *states)), leaves[:3])
    again = f(*leaves, initial_state=tuple(y.detach() for y in states) if len(states) > 1 else
              states[0].detach())  # fmt: skip
    assert again.isfinite().all() and all(y.isfinite().all() for y in grads)


@pytest.mark.parametrize("op", ["linear", "gated_linear"])
@pytest.mark.parametrize("way", ["fwd", "bwd"])
def test_to_pytorch_it_is_an_op_like_others(op, way):
    q, k, v, g = draw()
    s, z = torch.randn(2, 4, 8, 5), torch.rand(2, 4, 8) + 1
    more, options = (None,) * (3 if op == "linear" else 2), (0.3,)
    options = (0, False, 0.1) if op == "linear" else options
    given = (q, k, v) if op == "linear" else (q, k, v, g[..., None])
    if way == "bwd":
        given = (v, None, None, *given, v, s, z) if op == "linear" else (v, None, *given)
    else:
        given = tuple(x.clone().requires_grad_() for x in given)
    torch.library.opcheck(OPS[f"{op}_stateless_{way}"].overload, (*given, *more, *options))


@pytest.mark.parametrize("name", ["linear", "gated_linear"])
@pytest.mark.parametrize("train", [False, True])
def test_compiled(name, train, monkeypatch):
    """One graph, with the op in it."""
    x, f = draw(), CALLS[name]
    used = x[: 4 if name == "gated_linear" else 3]
    leaves = [y.clone().requires_grad_(train) for y in used]
    rest = x[len(used) :]
    monkeypatch.setattr(gated_linear if "gated" in name else linear, "spares", lambda x: True)
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
