"""The arithmetic of training: compiled and graphed steps give the numbers of eager ones."""

import copy
import itertools

import pytest
import torch
from rehearsal import rehearsed, repeatable
from torch.nn import functional as F

from tab.data.batches import Batches
from tab.data.load import Split
from tab.layers import attention_names
from tab.layers.basic import NoAttention
from tab.models.image_model import build_model
from tab.recipe.recipe import load_recipe
from tab.run_config import RunConfig
from tab.train.optimizers import SGD, AdamW, held
from tab.train.steps import Steps

SMALL = {"model.mlp.hidden": 16, "model.mlp.tokens": 4, "model.cnn.hidden": 16}
SMALL |= {"model.mlp.match": "", "model.cnn.match": "", "model.cnn.channels": 4, "train.lr": 0.01}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These batches are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(model="mlp", attention="multi_head", **train) -> RunConfig:
    given = {f"train.{key}": value for key, value in train.items()}
    return load_recipe("fair", {**SMALL, **given}).run_config(model, attention, 0)


def images(device="cpu", count=52):
    """Batches of 16 and a last one of 4."""
    generator = torch.Generator().manual_seed(3)
    pictures = torch.randint(256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    split = Split(pictures, torch.arange(count) % 10)
    std = torch.full((3,), 70.0)
    return Batches(split, batch_size=16, mean=std, std=std, shuffle=True, flip=True, device=device)


def steps_of(config, device="cpu"):
    device = torch.device(device)
    model = build_model(config, 10).to(device, memory_format=torch.channels_last)
    return Steps(model, config.train, 100, device)


def two_epochs(steps, batches):
    """The sums of each pass, then every weight, buffer and optimizer state."""
    sums = []
    for epoch in (0, 1):
        torch.manual_seed(epoch)  # of a layer that draws
        sums += [*steps.learn(batches.epoch(epoch)), *steps.score(batches.epoch(0))]
    return sums, [*steps.model.parameters(), *steps.model.buffers(), *held(steps.optimizer)]


def assert_same(given, wanted, **tolerance):
    losses, hits = ([sums[0][part::2] for sums in (given, wanted)] for part in (0, 1))
    assert losses[0] == pytest.approx(losses[1], rel=tolerance.get("rtol", 0), abs=0)
    assert hits[0] == pytest.approx(hits[1], abs=2 if tolerance else 0)  # two images on the edge
    for x, y in zip(given[1], wanted[1], strict=True):
        torch.testing.assert_close(x, y, **(tolerance or {"rtol": 0, "atol": 0}))


OPTIMIZERS = [
    {"optimizer": optimizer, "schedule": schedule, "decay": "weights", "weight_decay": 0.1}
    for optimizer in ("adamw", "sgd")
    for schedule in ("one_cycle", "constant")
]


@pytest.mark.parametrize(
    "model, attention, options",
    [("cnn", "kimi_k2", OPTIMIZERS[0]), ("mlp", "performer", OPTIMIZERS[1])]
    + [("mlp", "linear", x) for x in OPTIMIZERS],
)
def test_graphed_is_eager(model, attention, options):
    """State put back after warming up, a last batch of another size, gradients that stay."""
    config = config_of(model, attention, **options)
    steps, recorder = rehearsed(steps_of(config))
    given = two_epochs(steps, images())
    assert recorder.captures == 2  # one to learn, one to score
    assert_same(given, two_epochs(repeatable(steps_of(config)), images()))
    plain = two_epochs(steps_of(config), images())  # the rate is a float32 of the device there
    rounded = {"rtol": 1e-4, "atol": 2e-5}
    assert_same(given, plain, **rounded)


def test_a_graph_of_train_mode_is_not_replayed_in_eval_mode():
    """train_mode = "first_epoch" goes on learning in eval mode: batch norm then stands still."""
    config, sums = config_of("cnn", "none"), []
    for steps in (rehearsed(steps_of(config))[0], repeatable(steps_of(config))):
        passes = [steps.learn(images().epoch(e), training=e == 0) for e in (0, 1)]
        mean = steps.model.backbone.convolutions[1].running_mean
        before = mean.clone()
        passes.append(steps.learn(images().epoch(2), training=False))
        assert torch.equal(before, mean)
        sums.append((passes, [*steps.model.parameters(), *steps.model.buffers()]))
    (graphed, given), (eager, wanted) = sums
    assert graphed == eager
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


def test_graphed_draws_what_eager_draws(monkeypatch):
    def noisy(self, x, key_mask=None):
        return x + 0.1 * torch.randn_like(x) if self.training else x

    monkeypatch.setattr(NoAttention, "forward", noisy)
    config = config_of(attention="none")
    given = two_epochs(rehearsed(steps_of(config))[0], images())
    assert_same(given, two_epochs(repeatable(steps_of(config)), images()))


def test_gradients_stay_where_the_graph_writes_them():
    steps, _ = rehearsed(steps_of(config_of()))
    batches = list(images().epoch(0))
    steps.learn(batches[:1])
    places = [p.grad.data_ptr() for p in steps.model.parameters()]
    steps.learn(batches)
    assert places == [p.grad.data_ptr() for p in steps.model.parameters()]


def test_a_graph_is_made_again_for_the_other_mode():
    steps, recorder = rehearsed(steps_of(config_of("cnn")))
    x, y = next(images().epoch(0))
    for training in (True, True, False):
        steps.model.train(training)
        steps._step(x, y)
    assert recorder.captures == 2


def test_what_cannot_be_captured_is_named():
    steps, recorder = rehearsed(steps_of(config_of()))

    def capture(body):
        raise RuntimeError("operation not permitted when stream is capturing")

    recorder.capture = capture
    with pytest.raises(RuntimeError, match=r"MultiHead.*not permitted.*train.graph=false"):
        steps.learn(images().epoch(0))


def test_graphs_are_for_gpus():
    assert config_of().train.graph and not steps_of(config_of()).graphed


def test_score_is_the_plain_sum():
    steps, batches = steps_of(config_of("cnn")), images()
    loss, correct = steps.score(batches.epoch(0))
    steps.model.eval()
    with torch.no_grad():
        pairs = [(steps.model(x), y) for x, y in batches.epoch(0)]
    logits, y = (torch.cat(part) for part in zip(*pairs, strict=True))
    assert loss == pytest.approx(F.cross_entropy(logits, y, reduction="sum").item())
    assert correct == (logits.argmax(-1) == y).sum().item()


@pytest.mark.parametrize(
    "ours, torchs, options",
    [(AdamW, torch.optim.AdamW, {}), (SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True})],
)
def test_the_optimizer_is_torchs(ours, torchs, options):
    """To the bit, also where either goes on from the other's state."""
    ends = []
    for first, second in itertools.product((ours, torchs), repeat=2):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(3, 2, generator=generator).requires_grad_() for _ in range(2)]
        groups = [{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "weight_decay": 0.5}]
        state = None
        for kind in (first, second):
            optimizer = kind(groups, fused=True, **options)
            if state:
                optimizer.load_state_dict(state)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.2, 0.1], total_steps=4)
            for _ in range(3):
                optimizer.zero_grad()
                sum((w * torch.randn(3, 2, generator=generator)).sum() for w in weights).backward()
                optimizer.step()
                schedule.step()
            state = optimizer.state_dict()
        assert all(w.requires_grad for w in weights)
        ends.append([*weights, *(x for one in state["state"].values() for x in one.values())])
    for end in ends[1:]:
        assert all(map(torch.equal, end, ends[0]))


def test_sgd_is_its_formula():
    """v ← 0.9·v + g, w ← w − lr·(g + 0.9·v), where g has the decay of weights in it."""
    options = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.01, "schedule": "constant"}
    steps = steps_of(config_of("cnn", decay="weights", **options))
    other = copy.deepcopy(steps.model).train()
    decayed = {id(p) for p in steps.optimizer.param_groups[0]["params"]}
    known = {name for name, p in steps.model.named_parameters() if id(p) in decayed}
    assert 0 < len(known) < len(list(other.parameters()))
    v = {}
    for x, y in images().epoch(0):
        steps.learn([(x, y)])
        other.zero_grad()
        F.cross_entropy(other(x), y, label_smoothing=steps.options.label_smoothing).backward()
        with torch.no_grad():
            for name, p in other.named_parameters():
                g = p.grad + 0.01 * (name in known) * p
                v[name] = 0.9 * v.get(name, 0) + g
                p -= 0.1 * (g + 0.9 * v[name])
    torch.testing.assert_close(dict(steps.model.named_parameters()), dict(other.named_parameters()))


def test_logits_are_scaled():
    key = "model.resnet9.logit_scale"
    small = {"model.resnet9.channels": 4, "model.resnet9.hidden": 16, "model.resnet9.match": ""}
    plain, scaled = (
        build_model(load_recipe("resnet9", {**small, key: s}).run_config("resnet9", "none", 0), 10)
        for s in (1.0, 0.25)
    )
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(scaled.eval()(x), plain.eval()(x) / 4)


# What is proven is that the steps are right, not how fast the compiler's code is: it may come from
# this process alone, treat one number at a time, be as it is written, and suit any processor.
QUICKLY_COMPILED = {
    "compile_threads": 1,
    "cpp.simdlen": 1,
    "cpp.vec_isa_ok": True,
    "aot_inductor.debug_compile": True,
}


def test_compiled_is_eager():
    """In code of its own: batches of one size, since each size is compiled anew."""
    with torch._inductor.config.patch(QUICKLY_COMPILED):
        compiled = two_epochs(steps_of(config_of(compile=True)), images(count=32))
    assert_same(compiled, two_epochs(steps_of(config_of()), images(count=32)), rtol=1e-3, atol=1e-4)


def test_compiled_with_state(monkeypatch):
    """Router counts, largest scores and a loss of the layer's own, through the compiler's tracing
    (compiling its code too would take long)."""
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: compiler(model, backend="aot_eager", **options)
    )
    name = "attention.kimi_k2.balance_alpha"
    configs = [
        load_recipe("fair", {**SMALL, name: 0.1, "train.compile": c}).run_config(
            "mlp", "kimi_k2", 0
        )
        for c in (True, False)
    ]
    torch._dynamo.reset()
    pair = [two_epochs(steps_of(config), images(count=32)) for config in configs]
    assert_same(*pair, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attention", attention_names())
def test_autocast_on_a_cpu_where_asked_for(attention):
    """The linear layers multiply bfloat16 then; the weights, and what they learn, stay float32."""
    seen, losses = [], []
    for asked in (False, True):
        torch.manual_seed(0)
        steps = steps_of(config_of("cnn", attention, amp=True, amp_on_cpu=asked, lr=1e-3))
        steps.model.head.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
        batches = list(images().epoch(0))
        losses.append([steps.score(batches)[0], *(steps.learn(batches)[0] for _ in range(3))])
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in steps.model.parameters())
    assert seen == [torch.float32] * (len(seen) // 2) + [torch.bfloat16] * (len(seen) // 2)
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1][3] < losses[1][1]  # it learns


def test_autocast_on_a_cpu_needs_autocast():
    with pytest.raises(ValueError, match=r"amp_on_cpu = true .* give --set train.amp=true"):
        config_of(amp=False, amp_on_cpu=True)


# --- on a GPU -------------------------------------------------------------------------------------


def alike_on_gpu(*configs):
    """Losses and hits tell; where a gradient is nothing but rounding, AdamW makes a whole step of
    its sign: weights may differ by the rate in each of the eight steps."""
    rate = configs[0].train.lr
    with torch.backends.cudnn.flags(deterministic=True):
        pair = [two_epochs(steps_of(config, "cuda"), images("cuda")) for config in configs]
    assert_same(*pair, rtol=1e-3, atol=8 * rate)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", attention_names())
def test_gpu_graphed_is_eager(attention):
    """In float32: two epochs, a last batch of another size."""
    options = {"amp": False, "lr": 1e-3}
    config = config_of("cnn", attention, **options)
    assert steps_of(config, "cuda").graphed
    alike_on_gpu(config, config_of("cnn", attention, graph=False, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIMIZERS)
def test_gpu_graphed_optimizers_are_eager(options):
    options = options | {"amp": False, "lr": 1e-3}
    config = config_of("cnn", "linear", **options)
    outside = options["optimizer"] == "adamw" and options["schedule"] == "one_cycle"
    assert (steps_of(config, "cuda").in_graph is None) == outside
    alike_on_gpu(config, config_of("cnn", "linear", graph=False, **options))


WAITING = [(attention, {}) for attention in attention_names()]


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("attention, options", WAITING + [("linear", x) for x in OPTIMIZERS])
def test_gpu_no_step_waits(attention, options, graph):
    steps = steps_of(config_of("cnn", attention, graph=graph, **options), "cuda")
    batches = list(images("cuda").epoch(0))
    steps.learn(batches)  # compiles and captures
    steps.score(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in batches:
            steps._run_sums(x, y)
        steps.model.train()
        for x, y in batches:
            steps._step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
def test_gpu_compiled_is_eager(graph):
    options = {"amp": False, "graph": graph, "lr": 1e-3}
    alike_on_gpu(*(config_of("cnn", compile=c, **options) for c in (True, False)))
