"""The arithmetic of training: a step on one batch, a score of one batch, sums on the device.

The host waits for the device only where a pass ends, to read its sums. Three ways, chosen by the
recipe, to the same numbers: eager; train.compile, the model through torch.compile; train.graph, on
a GPU, forward, loss, backward and the optimizer's step as one CUDA graph.

Where the schedule moves β₁, too, as a one-cycle does for AdamW, the optimizer stays outside: fused,
it takes β₁ as a number, which a capture freezes (docs/gpu.md counts what else there is).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.image_model import ImageModel
from ..run_config import Train
from .optimizers import SGD, AdamW, InGraph, held

Batch = tuple[Tensor, Tensor]  # x (B, 3, S, S), y (B,)
WARM_UP = 3  # runs before a capture: they compile kernels and choose algorithms


def asked(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of a sequence only the last Q places ask: logits (B, N, classes), y (B, Q) -> (B·Q, classes),
    (B·Q,). Of images (B, classes) and (B,), as they are."""
    if y.dim() == 1:
        return logits, y
    return logits[:, -y.shape[1] :].flatten(0, 1), y.flatten()


class Steps:
    """A model with its optimizer and schedule; `learn` and `score` make one pass over batches."""

    def __init__(self, model: ImageModel, options: Train, count: int, device: torch.device):
        """count: of all steps, the length of the schedule."""
        self.model, self.options, self.device = model, options, device
        self.forward = torch.compile(model, dynamic=False) if options.compile else model
        groups = parameter_groups(model, options)
        rates = {"lr": options.lr, "weight_decay": options.weight_decay, "fused": True}
        adamw = options.optimizer == "adamw"
        self.optimizer: AdamW | SGD = (
            AdamW(groups, **rates) if adamw else SGD(groups, momentum=0.9, nesterov=True, **rates)
        )
        if options.schedule == "one_cycle":  # Smith & Topin 2018; PyTorch's shape of it
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer,
                max_lr=[group["lr"] for group in groups],
                total_steps=count,
                cycle_momentum=adamw,
            )
        else:
            self.schedule = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)
        self.average: dict[str, Tensor] = {}  # of the weights, where the recipe asks for it
        self.averages = averages_of(model)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.graphed = False
        self.in_graph: InGraph | None = None
        self._run_descent, self._run_sums = self._descend, self._sums
        if options.graph and device.type == "cuda":
            self.record(Recorder(device), Recorder(device))

    def record(self, learning: Recorder, scoring: Recorder) -> None:
        """From here on each step is a graph."""
        self.graphed = True
        if not getattr(self.schedule, "cycle_momentum", False):
            self.in_graph = InGraph(self.optimizer, self.device)
        self._run_descent = Graphed(self._descend, self, learning, learns=True)
        self._run_sums = Graphed(self._sums, self, scoring, learns=False)

    def learn(self, batches: Iterable[Batch], training: bool = True) -> tuple[float, int]:
        """An optimizer step on each batch -> the sum of the losses, the number of right answers,
        as the weights move. training: the mode of the model, if not eval."""
        self.model.train(training)
        return self._over(batches, self._step)

    def score(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """The same two sums with the weights as they are, or their average."""
        self.model.eval()
        with self.averaged():
            return self._over(batches, self._run_sums)

    @torch.no_grad()
    def predict(self, batches: Iterable[Batch]) -> Tensor:
        """The class that each image is taken for, (N,) int64, on the CPU."""
        self.model.eval()
        with self._autocast():
            logits = (asked(self.forward(x), y)[0] for x, y in batches)
            return torch.cat([each.argmax(-1) for each in logits]).cpu()

    @contextlib.contextmanager
    def averaged(self):
        """The model with the average of its weights, within."""
        state = self.model.state_dict()
        own = {name: state[name].clone() for name in self.average}
        self.use_average()
        try:
            yield
        finally:
            _put(state, own)

    def use_average(self) -> None:
        """Lays the average of the weights into the model, for good."""
        _put(self.model.state_dict(), self.average)

    @torch.no_grad()
    def _follow(self) -> None:
        """average ← ema·average + (1 − ema)·weights, from the first step on without a bias to it:
        the step number t counts with at most t/(t + 9) (as in timm and TensorFlow)."""
        count = self.schedule.last_epoch
        keep = min(self.options.ema, count / (count + 9))
        for name, value in self.model.state_dict().items():
            if name in self.averages:
                known = self.average.get(name)
                self.average[name] = (
                    value.clone() if known is None else known.lerp_(value, 1 - keep)
                )

    def _over(self, batches: Iterable[Batch], each: Callable) -> tuple[float, int]:
        cuda = self.device.type == "cuda"
        with torch.cuda.device(self.device) if cuda else contextlib.nullcontext():
            self.loss.zero_()
            self.correct.zero_()
            for x, y in batches:
                each(x, y)
            return self.loss.tolist(), self.correct.tolist()

    def _step(self, x: Tensor, y: Tensor) -> None:
        if self.in_graph:
            self.in_graph.feed()
        self._run_descent(x, y)
        if not self.in_graph:
            self.optimizer.step()
        self.schedule.step()
        self._after_step()

    def _after_step(self) -> None:
        self.model.after_step()
        if self.options.ema:
            self._follow()

    def _descend(self, x: Tensor, y: Tensor) -> None:
        self._gradients(x, y)
        if self.in_graph:
            self.in_graph.step()

    def _gradients(self, x: Tensor, y: Tensor) -> None:
        """Forward, loss, backward, into the gradients and the sums."""
        with self._autocast():
            logits, y = asked(self.forward(x), y)
            loss = F.cross_entropy(logits, y, label_smoothing=self.options.label_smoothing)
            extra = self.model.auxiliary_loss()
        # A graph writes its gradients where it was captured: there they must stay.
        self.optimizer.zero_grad(set_to_none=not self.graphed)
        (loss if extra is None else loss + extra).backward()
        self._add(loss.detach().double() * len(y), logits, y)

    @torch.no_grad()
    def _sums(self, x: Tensor, y: Tensor) -> None:
        with self._autocast():
            logits, y = asked(self.forward(x), y)
        self._add(F.cross_entropy(logits.float(), y, reduction="sum"), logits, y)

    def _add(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        self.loss += loss
        self.correct += (logits.argmax(-1) == y).sum()

    def _autocast(self):
        enabled = self.options.amp and (self.device.type == "cuda" or self.options.amp_on_cpu)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


@torch.no_grad()
def _put(state: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        state[name].copy_(value)


def averages_of(model: nn.Module) -> set[str]:
    """What an average of the weights is of: parameters, and the statistics that batch norm has of
    them. Other buffers are as they are in the last step: the mean of two of Performer's random
    projections, for instance, is none."""
    found = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            found |= {f"{name}.running_mean", f"{name}.running_var"}
    return found


NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def parameter_groups(model: nn.Module, options: Train) -> list[dict]:
    """The model's parameters for an optimizer, by weight decay and rate.

    With decay = "weights" those that decay does not belong to have none: biases, norms, embeddings,
    gates, and what a module names in `undecayed` (positions). A module names its gates in `gates`.
    The first group decays, and has the rate of the recipe.
    """
    found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            gate = name in getattr(module, "gates", ())
            bare = gate or name == "bias" or name in getattr(module, "undecayed", ())
            bare |= isinstance(module, (*NORMS, nn.Embedding))
            key = bare and options.decay == "weights", gate and options.gate_lr_ratio != 1
            found.setdefault(key, []).append(p)
    return [
        {
            "params": found[bare, gate],
            "lr": options.lr * (options.gate_lr_ratio if gate else 1),
            "weight_decay": 0.0 if bare else options.weight_decay,
        }
        for bare, gate in sorted(found)
    ]


class Graphed:
    """body(x, y), captured at its first call and replayed on copies of later x and y of that shape;
    batches of another shape (the last of an epoch) run as they are.

    Warming up moves the weights, what the optimizer holds, the sums, the buffers (batch norm's
    statistics, the experts' counts) and the random state; all are put back, so that a graphed run
    computes what an eager one does. What a layer draws must come from torch's default generator,
    which the graph knows.
    """

    def __init__(self, body: Callable, steps: Steps, recorder: Recorder, learns: bool):
        self.body, self.steps, self.recorder, self.learns = body, steps, recorder, learns
        self.replay: Callable[[], None] | None = None
        self.training, self.state = None, None  # of the model and of the optimizer, when captured

    def __call__(self, x: Tensor, y: Tensor) -> None:
        steps = self.steps
        same = self.training is steps.model.training and self.state is steps.optimizer.state
        if self.replay is None or not same:
            self._capture(x, y)
        if x.shape != self.x.shape:
            return self.body(x, y)
        self.x.copy_(x)
        self.y.copy_(y)
        self.replay()

    def _capture(self, x: Tensor, y: Tensor) -> None:
        model, optimizer, device = self.steps.model, self.steps.optimizer, self.steps.device
        self.training, self.state = model.training, optimizer.state
        self.x, self.y = x.clone(), y.clone()
        moved = [*model.buffers(), *model.statistics(), self.steps.loss, self.steps.correct]
        moved += [*model.parameters(), *held(optimizer)]
        before = [tensor.detach().clone() for tensor in moved]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for _ in range(WARM_UP):
                self.recorder.run(lambda: self.body(self.x, self.y))
            if self.learns:  # the backward pass of the capture makes them anew, in its own memory
                model.zero_grad(set_to_none=True)
            try:
                self.replay = self.recorder.capture(lambda: self.body(self.x, self.y))
            except RuntimeError as error:
                raise RuntimeError(
                    f"{type(model.attention).__name__} cannot be captured as a CUDA graph "
                    f"({error}); train it with --set train.graph=false"
                ) from error
        with torch.no_grad():
            for tensor, value in zip(moved, before, strict=True):
                tensor.copy_(value)
            known = {id(tensor) for tensor in moved}
            for tensor in held(optimizer):
                if id(tensor) not in known:  # no step was made before
                    tensor.zero_()


class Recorder:
    """Runs and captures on one stream of its own: autograd remembers on which it accumulates."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)

    def run(self, body: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            body()
        current.wait_stream(self.stream)

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            body()
        return graph.replay
