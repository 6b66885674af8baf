"""Layers under torch.compile, torch.export and activation checkpointing."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tab.layers import build_attention, layer_names

N, C = 40, 16
KINDS = {name: (name, {}) for name in layer_names()} | {
    "deepseek_mla": ("deepseek_mla", {"balance_alpha": 0.1}),
    "kimi_k2": ("kimi_k2", {"attention": "mha", "tau": 0.3, "balance_alpha": 0.1}),
    "kimi_k2 mla": ("kimi_k2", {"attention": "mla", "tau": 0.3}),
    "sparse small": ("sparse", {"block_size": 2, "num_random": 1, "rope": True}),
    "flex window": ("flex", {"pattern": "window", "rope": True}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def fresh(quiet):
    torch._dynamo.reset()


def build(kind):
    name, options = KINDS[kind]
    torch.manual_seed(0)
    return build_attention(name, C, seq_len=N, **options)


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def learn(layer, run, x):
    layer.zero_grad()
    y = run(x)
    loss, extra = y.square().sum(), layer.auxiliary_loss()
    # Three times the loss, as a scaler or an accumulation would have it.
    (3 * (loss if extra is None else loss + extra)).backward()
    return y.detach(), [x.grad, *(p.grad for p in layer.parameters())]


SOME = ("multi_head", "sparse small", "kimi_k2 mla")
often = pytest.mark.parametrize(
    ("kind", "masked"), [*((kind, False) for kind in SOME), *((kind, True) for kind in KINDS)]
)


@often
def test_two_compilations_serve_every_length(kind, masked):
    layer = build(kind)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for n in (32, 9, 11, 13, 20, 21, 33, 36, 39, 40):
        x, mask = tokens(2, n, C), torch.arange(n).expand(2, n) < n - 2 if masked else None
        torch.testing.assert_close(compiled(x, mask), layer(x, mask))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", ["sparse small", "sparse"])
def test_the_compiled_pattern_has_gradients(kind):
    layer, x = build(kind), tokens(2, N, C).requires_grad_()
    y, grads = learn(layer, layer, x)
    x.grad = None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    other, given = learn(layer, compiled, x)
    torch.testing.assert_close(other, y)
    for a, b in zip(given, grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@often
def test_export(kind, masked):
    """In training with a mask and in eval without: the same outputs, and every gradient."""
    layer, x = build(kind).train(masked), tokens(2, N, C).requires_grad_()
    mask = torch.arange(N).expand(2, N) < torch.tensor([[N], [N - 5]])
    given = (x, mask) if masked else (x,)
    results = []
    for run in (layer, torch.export.export(layer, given).module()):
        y = run(*given)
        wanted = [x, *run.parameters()]
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)])
    for a, b in zip(*results, strict=True):
        assert a is b is None or torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4) is None


@kinds
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(kind, reentrant):
    """Not the balance loss's gradient, nor what is counted, once for both forwards."""
    layer, x = build(kind), tokens(2, N, C).requires_grad_()
    if hasattr(layer, "moe"):
        layer.moe.balance_alpha = 5.0  # its gradient is no matter of rounding
    y, grads = learn(layer, layer, x)
    seen = [s.clone() for s in layer.statistics()]
    for s in layer.statistics():
        s.fill_(0 if s.dtype == torch.int64 else -torch.inf)
    x.grad = None
    other, given = learn(layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant), x)
    assert torch.equal(other, y)
    for a, b in zip(given, grads, strict=True):
        assert a is b is None or torch.equal(a, b)
    assert all(map(torch.equal, layer.statistics(), seen))


def test_the_balance_loss_enters_only_where_it_is_added():
    layer, x = build("deepseek_mla"), tokens(2, N, C).requires_grad_()
    grads = []
    for add in (False, True, False):
        for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=True)):
            layer.zero_grad()
            loss = run(x).square().sum()
            (loss + layer.auxiliary_loss() if add else loss).backward()
            grads.append(layer.moe.router.weight.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[2], grads[3])
    assert torch.equal(grads[0], grads[5]) and not torch.equal(grads[0], grads[2])
