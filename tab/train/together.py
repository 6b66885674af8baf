"""Training several seeds of one variant at once, as one stacked model (tab/models/stacked.py).

Each seed keeps its initial weights, order of images, augmentation, loss and run directory. Its
numbers are those of `train` alone but for the rounding of sums in another order. AdamW and its
schedule act on each number by itself: one optimizer over stacked weights is S optimizers.

group.pt, in the directory of the first run, is the one checkpoint of all: no crash finds two seeds
at different epochs, and the same seeds go on together, on a CPU to the same bits.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import files
from ..data.load import Dataset
from ..data.splits import split_batches
from ..files.formats import reading
from ..machine import Stopwatch
from ..models.stacked import SeedModel, stack
from ..run_config import RunConfig, Train
from . import checkpoint
from .loop import found_run
from .run_files import read_rows
from .steps import Batch, Steps, asked
from .training_run import Outcome, TrainingRun, random_of

FILE = "group.pt"


def train_seeds(
    configs: Sequence[RunConfig],
    dataset: Dataset,
    outs: Sequence[Path],
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    on_epoch: Callable[[int, dict], None] | None = None,
    stop_after: int | None = None,
) -> list[Outcome]:
    """Trains `configs`, which differ in their seed alone, at once; each in its own directory.

    As `train` in all else. A seed whose loss is not finite ends as diverged, the others go on. The
    seconds of an epoch are shared evenly: each row has the S-th part, and S as seeds_at_once.
    on_epoch(i, row): of configs[i].
    """
    outs = [Path(out) for out in outs]
    together = _check(configs, outs)
    with contextlib.ExitStack() as stay:
        for out in outs:
            stay.enter_context(files.locked(files.folder(out)))
        pairs = list(zip(configs, outs, strict=True))
        found = [found_run(c, dataset, out, resume, together) for c, out in pairs]
        ended = {
            i: Outcome(configs[i], read_rows(outs[i], run), run["status"], run["summary"])
            for i, run in enumerate(found)
            if run and run["status"] != "running"
        }
        runs = {}
        if len(ended) < len(configs):
            torch_device = torch.device(device)
            parts = split_batches(configs[0], dataset, torch_device)
            for i, (config, out) in enumerate(pairs):
                if i not in ended:
                    own = copy.copy(parts[0])  # the images are there once
                    own.seed = config.draws
                    alone = replace(config.train, compile=False, graph=False)  # for scores only
                    given = (own, *parts[1:]), alone, together
                    runs[i] = TrainingRun(config, dataset, torch_device, out, *given)
            _train(runs, outs[0] / FILE, on_epoch, stop_after)
        outcomes = {**ended, **{i: run.outcome() for i, run in runs.items()}}
        return [outcomes[i] for i in range(len(configs))]


def _check(configs: Sequence[RunConfig], outs: Sequence[Path]) -> list[str]:
    """The ids of the runs."""
    ids = [config.id for config in configs]
    if not configs or len(set(ids)) < len(ids) or len(set(outs)) < len(configs):
        raise ValueError(
            f"runs {', '.join(ids) or 'none'} in {len(set(outs))} directories: give each seed "
            "once, and each its own directory"
        )
    if configs[0].train.ema:
        raise ValueError(
            f"train.ema = {configs[0].train.ema}: the weights of several seeds at once are not "
            "averaged; train one at a time (leave out --batch-seeds)"
        )
    if others := [c.id for c in configs if _variant(c) != _variant(configs[0])]:
        raise ValueError(
            f"{', '.join(others)} differ from {ids[0]} in more than the seed: only seeds "
            "of one variant train at once"
        )
    return ids


def _variant(config: RunConfig) -> RunConfig:
    """What all seeds share; a layer's own seed is the run's (tab/recipe/recipe.py)."""
    options = {k: v for k, v in config.attention_options.items() if k != "seed"}
    return replace(config, seed=0, attention_options=options)


def _train(
    runs: dict[int, TrainingRun],
    path: Path,
    on_epoch: Callable[[int, dict], None] | None,
    stop_after: int | None,
) -> None:
    """Goes on from `path`, if it is there, until each run has ended, or has `stop_after` epochs."""
    _restore(runs, path)
    for run in runs.values():
        if run.status != "running":
            run.write()  # the process had ended before it
    while going := {i: run for i, run in runs.items() if run.status == "running"}:
        group = _Group(list(going.values()))
        while all(run.status == "running" for run in group.runs):
            if stop_after and len(group.runs[0].rows) >= stop_after:
                return
            group.epoch()
            states = {run.config.id: run.state() | {"status": run.status} for run in group.runs}
            checkpoint.save(path, states)
            for i, run in going.items():
                run.write()
                if on_epoch:
                    on_epoch(i, run.rows[-1])
    path.unlink(missing_ok=True)


def _restore(runs: dict[int, TrainingRun], path: Path) -> None:
    """Back to the last complete epoch of all; to the start if it is damaged."""
    if not path.exists():
        return
    with reading(path, "remove it, and these runs start again from their first epoch"):
        try:
            states = checkpoint.load(path, next(iter(runs.values())).device)
        except files.Corrupt as error:
            warnings.warn(f"{error}; these runs start again from their first epoch", stacklevel=4)
            return
        for run in runs.values():
            state = states[run.config.id]
            run.load(state)
            run.status = state["status"]


class _Group:
    """Runs that are at the same epoch, stacked; each is brought up to date after an epoch."""

    def __init__(self, runs: list[TrainingRun]):
        self.runs, first = runs, runs[0]
        self.model: SeedModel = stack([run.model for run in runs])
        if said := self.model.statement():
            warnings.warn(f"{first.config.attention} {said}", stacklevel=2)
        count = first.config.train.epochs * len(first.batches)
        self.steps = SeedSteps(self.model, first.config.train, count, first.device)
        self.steps.join([run.steps for run in runs])

    def epoch(self) -> None:
        runs, first = self.runs, self.runs[0]
        rate = self.steps.schedule.get_last_lr()[0]
        with random_of(first.device):
            self.model.start([run.number for run in runs], first.device)
            with Stopwatch() as time:
                sums = self.steps.learn(self._batches(len(first.rows)), first.training)
        self.steps.part([run.steps for run in runs])
        for run, loss, correct in zip(runs, *sums, strict=True):
            run.add(rate, loss, correct, time, len(runs))

    def _batches(self, epoch: int) -> Iterator[Batch]:
        """x (S·B, 3, rows, cols), y (S·B,): of each seed its own batch."""
        for batches in zip(*(run.batches.epoch(epoch) for run in self.runs), strict=True):
            images, labels = zip(*batches, strict=True)
            yield torch.cat(images), torch.cat(labels)


class SeedSteps(Steps):
    """The arithmetic of S seeds; the sums of `learn` are lists of S."""

    def __init__(self, model: SeedModel, options: Train, count: int, device: torch.device):
        if model.one_by_one():  # a CUDA graph cannot go from one random stream to another
            options = replace(options, graph=False)
        super().__init__(model, options, count, device)
        self.seeds = len(model.seeds)
        self.loss, self.correct = (t.repeat(self.seeds) for t in (self.loss, self.correct))
        self.homes = {  # of each seed's parameters: the stacked one, and whose part; or itself
            id(p): (leaf, s)
            for leaf in model.parameters()
            for s, p in (enumerate(leaf.seeds) if hasattr(leaf, "seeds") else [(None, leaf)])
        }

    def _after_step(self) -> None:
        for model in self.model.seeds:
            model.after_step()

    def _gradients(self, x: Tensor, y: Tensor) -> None:
        smoothing = self.options.label_smoothing
        with self._autocast():
            logits, y = asked(self.forward(x), y)  # (S·B, classes), (S·B,)
            losses = F.cross_entropy(logits, y, label_smoothing=smoothing, reduction="none")
            losses = losses.view(self.seeds, -1).mean(1)
            extra = [model.auxiliary_loss() for model in self.model.seeds]
        self.optimizer.zero_grad(set_to_none=not self.graphed)
        # The gradient of each seed's weights is that of its own terms.
        sum((term for term in extra if term is not None), losses.sum()).backward()
        self._add(losses.detach().double() * (len(y) // self.seeds), logits, y)

    def _add(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        self.loss += loss
        self.correct += (logits.argmax(-1) == y).view(self.seeds, -1).sum(1)

    # --- the optimizer of each seed ---------------------------------------------------------------

    def join(self, alone: list[Steps]) -> None:
        """Takes over what the seeds' own optimizers and schedules hold."""
        states: dict[Tensor, dict] = {}
        for p, own in ((p, own) for steps in alone for p, own in steps.optimizer.state.items()):
            leaf, s = self.homes[id(p)]
            for key, value in own.items():
                if s is None or value.dim() == 0:
                    states.setdefault(leaf, {})[key] = value.clone()
                else:
                    joined = states.setdefault(leaf, {}).setdefault(key, torch.empty_like(leaf))
                    joined.detach_()[s] = value
        self.optimizer.state.update(states)
        _settings(alone[0], self)

    def part(self, alone: list[Steps]) -> None:
        """Gives each seed's own optimizer and schedule what is now theirs."""
        for steps, model in zip(alone, self.model.seeds, strict=True):
            for p in model.parameters():
                leaf, s = self.homes[id(p)]
                whole = s is None
                steps.optimizer.state[p] = {
                    key: value if whole or value.dim() == 0 else value[s].clone()
                    for key, value in self.optimizer.state.get(leaf, {}).items()
                }
            _settings(self, steps)


def _settings(source: Steps, target: Steps) -> None:
    """The schedule, and what it has set in the optimizer."""
    for old, new in zip(source.optimizer.param_groups, target.optimizer.param_groups, strict=True):
        new.update({key: value for key, value in old.items() if key != "params"})
    target.schedule.load_state_dict(source.schedule.state_dict())
