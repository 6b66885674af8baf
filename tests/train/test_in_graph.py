"""The optimizer's step inside a CUDA graph: it is the optimizer's step, and reads nothing that a
capture would freeze."""

import copy

import pytest
import torch
from rehearsal import rehearsed, repeatable
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tab.run_config import Train
from tab.train.optimizers import SGD, AdamW, InGraph, held
from tab.train.steps import Steps

ADAMW = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}
INSIDE = [
    ADAMW | {"schedule": "constant"},
    ADAMW | {"schedule": "one_cycle", "optimizer": "sgd"},
    ADAMW | {"schedule": "constant", "optimizer": "sgd"},
]
OUTSIDE = ADAMW | {"schedule": "one_cycle"}  # which moves β₁
KINDS = [*INSIDE, OUTSIDE]
COUNT = 40  # of all steps


class Small(nn.Module):
    """What `Steps` wants of an image model; one of its weights is not in use."""

    def __init__(self):
        super().__init__()
        self.attention, self.body = nn.Identity(), nn.Linear(12, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.head(self.norm(self.body(x.flatten(1)).relu()))

    def auxiliary_loss(self):
        return None

    def after_step(self):
        pass

    def statistics(self):
        return []


def steps_of(options, **more) -> Steps:
    torch.manual_seed(0)
    fixed = {"epochs": 1, "batch_size": 6, "train_mode": "always", "label_smoothing": 0.1}
    fixed |= {"amp": False, "compile": False, "graph": True, "decay": "weights"}
    train = Train(**fixed, **options, **more)
    return Steps(Small(), train, COUNT, torch.device("cpu"))


def batches(count, start=0):
    for i in range(start, start + count):
        generator = torch.Generator().manual_seed(i)
        size = 4 if i % 7 == 5 else 6  # of another size: not in the graph
        x = torch.randn(size, 3, 2, 2, generator=generator)
        yield x, torch.randint(4, (size,), generator=generator)


def everything(steps):
    return [*steps.model.parameters(), *held(steps.optimizer)]


# --- the right numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
def test_replayed_steps_are_the_plain_ones(options):
    """A whole schedule, with average: to the bit those that are repeated, and PyTorch's own but for
    rounding."""
    found = []
    for change in (rehearsed, repeatable, lambda steps: None):
        steps = steps_of(options, ema=0.9)
        change(steps)
        sums = steps.learn(batches(COUNT))
        found.append((sums, everything(steps), [*steps.average.values()]))
    for given, wanted in zip(found[0][1:], found[1][1:], strict=True):
        assert all(map(torch.equal, given, wanted))
    assert found[0][0] == found[1][0]
    for given, wanted in zip(found[0][1:], found[2][1:], strict=True):
        torch.testing.assert_close(given[: len(wanted)], wanted, rtol=1e-3, atol=1e-5)


# --- nothing of a step is frozen ------------------------------------------------------------------


class Script(TorchDispatchMode):
    """Each operator that is called, with all that it is given but tensors."""

    def __init__(self):
        super().__init__()
        self.lines, self.rates = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_flatten((args, kwargs or {}))[0]
        plain = [x for x in leaves if not isinstance(x, torch.Tensor)]
        if func.namespace != "profiler":
            self.lines.append((str(func), repr(plain)))
        if "_fused_" in str(func) and isinstance(kwargs["lr"], FakeTensor):
            self.rates.append(kwargs["lr"].device.type)
            return None  # PyTorch's kernel, which has no fake
        return func(*args, **(kwargs or {}))


def scripts(steps, at=(3, 20)):
    """Of the body of a step at these steps of the schedule."""
    for i, batch in enumerate(batches(max(at) + 1)):
        if i in at:
            if steps.in_graph:
                steps.in_graph.feed()
            with Script() as script:
                steps._descend(*batch)
            yield script.lines
            steps.schedule.step()
        else:
            steps.learn([batch])


HOST = ("_local_scalar_dense", "nonzero", "equal")


@pytest.mark.parametrize("options", INSIDE)
def test_each_step_is_the_same_calls_with_the_same_numbers(options):
    early, late = scripts(repeatable(steps_of(options)))
    assert early == late
    assert not [line for line in early if any(f".{name}." in line[0] for name in HOST)]
    assert any("_fused_" in name and "tensor_lr" in name for name, _ in early)


def test_a_rate_that_is_a_number_would_be_frozen(monkeypatch):
    monkeypatch.setattr(InGraph, "step", lambda self: self.optimizer.step())
    early, late = scripts(repeatable(steps_of(INSIDE[1])))
    changed = {a[0] for a, b in zip(early, late, strict=True) if a != b}
    assert changed == {"aten._fused_sgd_.default"}


@pytest.mark.parametrize("kind, more", [(AdamW, {}), (SGD, {"momentum": 0.9, "nesterov": True})])
def test_its_step_reads_no_value_of_the_device(kind, more):
    """As fake tensors of a GPU, whose values cannot be had, and not on the CPU, which would do."""
    with FakeTensorMode():
        weights = [torch.empty(4, 3, device="cuda").requires_grad_() for _ in range(2)]
        groups = [{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.0}]
        optimizer = kind(groups, lr=0.1, weight_decay=0.1, fused=True, **more)
        inside = InGraph(optimizer, torch.device("cuda"))
        inside.feed()
        for w in weights:
            w.grad = torch.empty_like(w)
        with Script() as script:
            inside.step()
        assert {x.device.type for x in (*held(optimizer), inside.rates)} == {"cuda"}
        assert script.rates == ["cuda", "cuda"]
        with pytest.raises(DataDependentOutputException):
            float(inside.rates[0])


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
def test_a_run_goes_on_from_the_state_of_another(options):
    """Graphs into graphs to the bit, and either kind into the other: groups hold plain numbers."""
    whole = steps_of(options)
    rehearsed(whole)
    whole.learn(batches(COUNT))
    for first, second in ((True, True), (True, False), (False, True)):
        steps = steps_of(options)
        if first:
            rehearsed(steps)
        steps.learn(batches(15))
        saved = copy.deepcopy(
            [x.state_dict() for x in (steps.model, steps.optimizer, steps.schedule)]
        )
        plain = steps_of(options).optimizer.state_dict()
        assert [*saved[1]["param_groups"][0]] == [*plain["param_groups"][0]]
        assert all(type(group["lr"]) is float for group in saved[1]["param_groups"])
        later = steps_of(options)
        if second:
            rehearsed(later)
            later.learn(batches(2))  # a graph of other state is made again
        for part, state in zip((later.model, later.optimizer, later.schedule), saved, strict=True):
            part.load_state_dict(state)
        later.learn(batches(COUNT - 15, 15))
        for given, wanted in zip(later.model.parameters(), whole.model.parameters(), strict=True):
            if first and second:
                assert torch.equal(given, wanted)
            torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-5)
        means = (held(later.optimizer), held(whole.optimizer))
        if first and second:
            assert all(map(torch.equal, *means))
