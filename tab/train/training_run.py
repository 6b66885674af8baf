"""One run between its epochs: what it is made of, its rows, and its state on disk.

A run directory holds run.json (config, status, environment, summary), rows.jsonl (one line an
epoch), checkpoint.pt while it runs (all that the next epoch needs) and at the end model.safetensors
(weights.py) and, where the test set was scored, test.npz: each test image's class and what it was
taken for.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .. import files
from ..data.batches import Batches
from ..data.load import Dataset
from ..data.splits import split_batches
from ..files import write_text
from ..files.formats import reading, write_json
from ..machine import Stopwatch, environment, keep_freed_memory, load, peak_memory
from ..models.flops import forward_flops
from ..models.image_model import build_model, layer_class, parameter_count
from ..models.parts import shares
from ..plugins import origin
from ..run_config import RunConfig, Train
from . import checkpoint
from .steps import Steps
from .weights import FILE, save_weights

WHITENED = 512  # images whose patches the whitening layer is made for
SHARES = 256  # images on which the share of the branches is measured
ANSWERS = "test.npz"  # in a run's directory: predicted and label of each test image


@dataclass(frozen=True)
class Outcome:
    """status: "done", "diverged" (a loss was not finite), "running" (stopped before its end)."""

    config: RunConfig
    rows: list[dict]
    status: str
    summary: dict


class TrainingRun:
    """The state of a run between two epochs.

    parts: its batches, as from `split_batches`, if they are there already. options: how it
    computes, if not as the recipe says. together: the ids of the runs it is trained with
    (together.py).
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        device: torch.device,
        out: Path,
        parts: tuple[Batches, Batches | None, Batches] | None = None,
        options: Train | None = None,
        together: list[str] | None = None,
    ):
        self.together = together
        self.config, self.dataset, self.device, self.out = config, dataset, device, out
        self.status, self.rows, self.load_at_start = "running", [], load()
        self.shares: dict[str, float | None] = shares([])
        self.batches, self.validation, self.test = parts or split_batches(config, dataset, device)
        model = build_model(config, len(dataset.classes))
        self.flops = forward_flops(model)
        if getattr(config.model_options, "whiten", False):
            model.backbone.see(first_images(self.batches))
        self.model = place(model, device)
        count = config.train.epochs * len(self.batches)
        self.steps = Steps(self.model, options or config.train, count, device)
        self._describe()

    def epoch(self) -> None:
        """One pass over the training images, then the scores of this epoch: a new row."""
        epoch, rate = len(self.rows), self.steps.schedule.get_last_lr()[0]
        with random_of(self.device):
            torch.manual_seed(self.number)
            with Stopwatch() as time:
                loss, correct = self.steps.learn(self.batches.epoch(epoch), self.training)
        self.add(rate, loss, correct, time)

    @property
    def training(self) -> bool:
        """The mode of the model in the next epoch."""
        return not self.rows or self.config.train.train_mode == "always"

    @property
    def number(self) -> int:
        """What a layer draws in the next epoch, from torch's random stream, is a function of it."""
        return (self.config.draws * 1_000_003 + len(self.rows)) % 2**64

    def add(self, rate: float, loss: float, correct: int, time: Stopwatch, seeds: int = 1) -> None:
        """The row of an epoch that was trained: `loss` and `correct` are sums over its images.
        seeds: how many shared its time."""
        last = len(self.rows) + 1 == self.config.train.epochs
        before = self.rows[-1]["cumulative_training_time"] if self.rows else 0.0
        samples, answers = self.batches.samples, self.batches.answers
        row = {"epoch": len(self.rows) + 1, "learning_rate": rate, "seeds_at_once": seeds}
        row |= {"train_loss": loss / answers, "train_accuracy": correct / answers}
        seconds = time.seconds / seeds
        row |= {"seconds": seconds, "cpu_seconds": time.cpu / seeds}
        row |= {"waited_seconds": None if time.waited is None else time.waited / seeds}
        row |= {"cumulative_training_time": before + seconds}
        row |= {"images_per_second": samples / seconds}
        row |= {"peak_memory_bytes": peak_memory(self.device)}
        split = self.config.evaluate.split
        test = split == "test" or (split == "validation" and last)
        row |= self._score("validation", self.validation)
        row |= self._score("test", self.test if test else None)
        self.rows.append({key: row[key] for key in ROW})
        losses = [row[f"{part}_loss"] for part in ("train", "validation", "test")]
        if not all(math.isfinite(x) for x in losses if x is not None):
            self.status = "diverged"
        elif last:
            self.status = "done"

    def _score(self, part: str, batches: Batches | None) -> dict:
        loss, accuracy = None, None
        if batches is not None:
            loss, correct = self.steps.score(batches.epoch(0))
            loss, accuracy = loss / batches.answers, correct / batches.answers
        return {f"{part}_loss": loss, f"{part}_accuracy": accuracy}

    # --- disk ---

    def save(self) -> None:
        """After an epoch. Each file is replaced whole; the order makes any crash between harmless:
        the rows are also in the checkpoint, and run.json says "done" last."""
        if self.status == "running":
            checkpoint.save(self.out / "checkpoint.pt", self.state())
        self.write()

    def state(self) -> dict:
        """All that the next epoch needs."""
        return {
            "rows": self.rows,
            "model": weights(self.model),
            "optimizer": self.steps.optimizer.state_dict(),
            "schedule": self.steps.schedule.state_dict(),
            "average": self.steps.average,
        }

    def load(self, state: dict) -> None:
        self.rows = state["rows"]
        self.model.load_state_dict(state["model"])
        self.steps.optimizer.load_state_dict(state["optimizer"])
        self.steps.schedule.load_state_dict(state["schedule"])
        self.steps.average = state.get("average", {})  # not in 0.1

    def write(self) -> None:
        """What others read: the rows, and at the end the weights, answers and summary."""
        if self.status == "done":
            self.steps.use_average()
            self.measure_shares()
            about = {"config": self.config.to_dict(), "classes": list(self.dataset.classes)}
            if not self.dataset.sequences:
                about |= {k: getattr(self.test, k).tolist() for k in ("mean", "scale")}
            save_weights(self.out / FILE, weights(self.model), about)
            if self.rows[-1]["test_accuracy"] is not None:
                self._save_answers()
        write_text(self.out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        if self.status != "running":
            self._describe()
            (self.out / "checkpoint.pt").unlink(missing_ok=True)

    @torch.no_grad()
    def measure_shares(self) -> None:
        """How far the residual branches got, on the first images that are held out; a diverged run
        has none."""
        x, _ = next((self.validation or self.test).epoch(0))
        self.model.eval()
        self.shares = shares(self.model.branches(x[:SHARES]))

    def _save_answers(self) -> None:
        """The scored weights once more over the test set, for statistics by image."""
        kind = np.min_scalar_type(len(self.dataset.classes) - 1)
        file = io.BytesIO()
        np.savez(
            file,
            predicted=self.steps.predict(self.test.epoch(0)).numpy().astype(kind),
            label=self.test.labels.flatten().cpu().numpy().astype(kind),
        )
        files.write(self.out / ANSWERS, file.getvalue())

    def restore(self) -> None:
        """Back to the last complete epoch; to the start if there is none, or it is damaged."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return
        way_out = "remove it, and this run starts again from its first epoch"
        with reading(path, way_out):
            try:
                state = checkpoint.load(path, self.device)
            except files.Corrupt as error:
                warnings.warn(f"{error}; this run starts again from its first epoch", stacklevel=3)
                return
            self.load(state)

    def _describe(self) -> None:
        run = {
            "config": self.config.to_dict(),
            "status": self.status,
            "together": self.together,
            "plugin": origin(layer_class(self.config)),
            "data": {k: getattr(self.dataset, k) for k in ("name", "note", "fingerprint")},
            "classes": list(self.dataset.classes),
            "environment": environment(self.device) | {"load_at_start": self.load_at_start},
            "summary": self.outcome().summary,
        }
        write_json(self.out / "run.json", run)

    def outcome(self) -> Outcome:
        rows, last = self.rows, self.rows[-1] if self.rows else dict.fromkeys(ROW)
        scores = [row["test_accuracy"] for row in rows if row["test_accuracy"] is not None]
        seconds = last["cumulative_training_time"]
        summary = {
            "final_test_accuracy": last["test_accuracy"],
            "max_test_accuracy": max(scores, default=None),
            "final_train_accuracy": last["train_accuracy"],
            "final_train_loss": last["train_loss"],
            "min_train_loss": min((row["train_loss"] for row in rows), default=None),
            "total_training_time": seconds,
            "num_epochs": len(rows),
            "parameters": parameter_count(self.model),
            "attention_parameters": sum(map(parameter_count, self.model.layers())),
            "block_parameters": self.model.block_parameters(),
            "flops": self.flops,
            "images_per_second": self.batches.samples * len(rows) / seconds if rows else None,
            "peak_memory_bytes": max((row["peak_memory_bytes"] for row in rows), default=None),
            "seeds_at_once": last.get("seeds_at_once"),
            **self.shares,
            "status": self.status,
        }
        return Outcome(self.config, rows, self.status, summary)


ROW = (
    *("epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"),
    *("test_loss", "test_accuracy", "seconds", "cumulative_training_time", "images_per_second"),
    *("peak_memory_bytes", "learning_rate", "cpu_seconds"),
    "waited_seconds",  # of "seconds": without a core to compute on (machine.Stopwatch)
    "seeds_at_once",  # above 1: this run's share of the seconds of so many (tab/train/together.py)
)


# --- around it ------------------------------------------------------------------------------------


@contextlib.contextmanager
def random_of(device: torch.device) -> Iterator[None]:
    """What is drawn within leaves torch's random streams as they were; the peak of the device's
    memory counts from here."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with torch.random.fork_rng([device] if cuda else []):
        yield


def first_images(batches: Batches) -> torch.Tensor:
    """Those of the first batches of the first epoch, 512 or as many as there are."""
    found, count = [], 0
    for x, _ in batches.epoch(0):
        found.append(x.cpu())
        count += len(x)
        if count >= WHITENED:
            break
    return torch.cat(found)


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device, its convolutions' weights with the channels last."""
    if device.type == "cpu":
        keep_freed_memory()
    return model.to(device, memory_format=torch.channels_last)  # of the convolutions' weights


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Its state, copied: torch.save would write all that a view is a view of."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
