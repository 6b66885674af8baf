"""Graphs that are trained: torch.export, torch.compile, torch.jit.trace give the gradients of eager
mode, by the same kernels. And AOTInductor, which serves."""

import io

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

from tab import linear_attention, orthogonal_projection, performer_attention
from tab.layers import attention_names, build_attention
from tab.ops.linear import linear_fwd
from tab.ops.performer import performer_fwd

N, C = 16, 16
NAMES = [name for name in attention_names() if name != "none"]  # "none" has nothing to learn


def layer(name):
    torch.manual_seed(0)
    return build_attention(name, C, seq_len=N), torch.randn(2, N, C)


def trained(model, x):
    """The loss and the gradient of every parameter, by its name."""
    model.zero_grad()
    loss = model(x).square().sum()
    loss.backward()
    return loss, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def reloaded(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_layer_trains(name):
    """Exported for inference, without gradients, and trained all the same, also when it was kept in
    a file. What is exported for training is trained in test_compile.py."""
    model, x = layer(name)
    eager = trained(model, x)
    assert all(grad.any() for grad in eager[1].values()) and eager[1]
    with torch.no_grad():
        program = torch.export.export(model, (x,))
    for exported in (program, reloaded(program)):
        assert_close(trained(exported.module(), x), eager)


@pytest.mark.parametrize("name", ("linear", "performer"))
def test_exported_strictly_and_traced(name):
    model, x = layer(name)
    eager = trained(model, x)
    assert_close(trained(torch.export.export(model, (x,), strict=True).module(), x), eager)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (x,)), buffer)
    buffer.seek(0)
    assert_close(trained(torch.jit.load(buffer), x), eager)


class Every(nn.Module):
    """All layers on the same tokens, in one program: eleven would take minutes to compile."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: layer(name)[0] for name in NAMES})

    def forward(self, x):
        return {name: one(x) for name, one in self.layers.items()}


# What is proven is the calls; how fast the rest of the program is does not matter.
QUICKLY_COMPILED = {
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,  # for one file
    "cpp.vec_isa_ok": True,
    "cpp.simdlen": 1,
}


@pytest.mark.slow
def test_aot_inductor_serves(tmp_path):
    model, x = Every().eval(), torch.randn(2, N, C, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        path = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "layers.pt2"),
            inductor_configs=QUICKLY_COMPILED,
        )
        served, wanted = torch._inductor.aoti_load_package(path)(x), model(x)
    assert_close(served, wanted, rtol=1e-4, atol=1e-5)


class Attention(nn.Module):
    def __init__(self, attend, dtype=torch.float64):
        super().__init__()
        self.project, self.attend = nn.Linear(4, 12, dtype=dtype), attend

    def forward(self, x):
        return self.attend(*self.project(x).chunk(3, -1))


@pytest.fixture(params=("linear", "performer"))
def attend(request, generator):
    if request.param == "linear":
        return linear_attention
    w = orthogonal_projection(6, 4, generator=generator, dtype=torch.float64)
    return lambda q, k, v, **options: performer_attention(q, k, v, w, **options)


@pytest.mark.parametrize("causal", (False, True))
def test_compiled_training_runs_the_backward_kernel(attend, causal, generator):
    """One op forward and one op backward; nothing of the reference is in the graphs."""
    model = Attention(lambda *x: attend(*x, causal=causal))
    x = torch.randn(2, 2, 5, 4, generator=generator, dtype=torch.float64)
    eager, graphs = trained(model, x), []

    def note(graph, _):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    assert_close(trained(torch.compile(model, fullgraph=True, backend=backend), x)[0], eager[0])
    compiled = {k.removeprefix("_orig_mod."): p.grad for k, p in model.named_parameters()}
    assert_close(compiled, eager[1])
    ours = [[name for name in names if name.startswith("tab.")] for names in graphs]
    assert [len(names) for names in ours] == [1, 1]
    assert ours[0][0].endswith("_fwd.default") and ours[1][0].endswith("_bwd.default")
    assert not any("exp" in name or "cumsum" in name for names in graphs for name in names)


def test_second_derivatives_in_a_compiled_graph(attend, generator):
    """Where the graph's backward is eager's, they are right; AOT Autograd refuses, as it says."""
    leaves = [
        torch.randn(1, 2, 5, 4, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    ]
    torch._dynamo.reset()
    f = torch.compile(lambda *x: attend(*x), fullgraph=True, backend="eager")
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)
    f = torch.compile(lambda *x: attend(*x), fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(f(*leaves).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        sum(g.square().sum() for g in grads).backward()


def test_the_op_itself(generator):
    """Called without the function around it: opcheck, and torch.func."""
    x = [torch.randn(1, 2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    w = orthogonal_projection(6, 4, generator=generator, dtype=torch.float64)
    for op, args, public in (
        (linear_fwd.overload, (None, None, None, 0, True, 0.0), linear_attention),
        (
            performer_fwd.overload,
            (w, None, None, None, None, 0, True, 0.0),
            lambda *x, **options: performer_attention(*x, w, **options),
        ),
    ):
        torch.library.opcheck(op, (*(t.clone().requires_grad_() for t in x), *args))

        def loss(q, op=op, args=args):
            return op(q, *x[1:], *args)[0].sin().sum()

        def same(q, public=public):
            return public(q, *x[1:], causal=True).sin().sum()

        assert_close(torch.func.grad(loss)(x[0]), torch.func.grad(same)(x[0]))
        assert_close(torch.func.hessian(loss)(x[0]), torch.func.hessian(same)(x[0]))
