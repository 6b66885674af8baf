"""The net and recipe of the record that reaches 94.0 % of CIFAR-10 (Jordan 2024, "94% on CIFAR-10
in 3.29 Seconds", arXiv:2404.00498), written from its paper, on any copy of the images.

    python bench/record.py --data DIR --out OUT [--epochs 9.9] [--threads 2] [--batch 1024]

Whoever loses points on a copy of CIFAR-10 asks whether it is the copy or his training: of this
training the accuracy on the original pixels is published. It prints, and appends to OUT/rows.jsonl,
a line an epoch; the last one has the accuracy on all test images: plain, with mirrored copies, and
with mirrored and shifted ones, as the record is scored. What was interrupted goes on after its last
epoch. In float32 on a CPU it takes 0.35 PFLOP and 5 GB of memory.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from tab.data.load import load_dataset

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
WIDTHS, PATCHES = (64, 256, 256), 24  # channels; filters of the first layer and their negatives
MOMENTUM, SMOOTHING, BIAS_RATE = 0.85, 0.2, 64  # biases of norms move faster by so much
RATE, DECAY = 11.5, 0.0153  # of 1,024 examples, as if momentum added nothing
FIRST, PEAK, LAST = 0.2, 0.23, 0.07  # rate at the start; when it is highest; rate at the end
BIAS_EPOCHS, AVERAGE_EVERY, AVERAGE = 3, 5, 0.95**5  # of the first layer; of the weights


def norm(channels: int) -> nn.Module:
    made = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    made.weight.requires_grad = False
    return made


def conv(into: int, out: int) -> nn.Module:
    """Begins as the identity on its first channels."""
    made = nn.Conv2d(into, out, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(made.weight[:into])
    return made


def group(into: int, out: int) -> list[nn.Module]:
    first = [conv(into, out), nn.MaxPool2d(2), norm(out), nn.GELU()]
    return [*first, conv(out, out), norm(out), nn.GELU()]


class Net(nn.Module):
    def __init__(self, classes: int, images: Tensor):
        super().__init__()
        self.whiten = nn.Conv2d(3, PATCHES, 2)
        a, b, c = WIDTHS
        self.body = nn.Sequential(
            nn.GELU(), *group(PATCHES, a), *group(a, b), *group(b, c), nn.MaxPool2d(3), nn.Flatten()
        )
        self.head = nn.Linear(c, classes, bias=False)
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        with torch.no_grad():
            self.whiten.weight.copy_(torch.cat([filters, -filters]))
            self.whiten.bias.zero_()
        self.whiten.weight.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return self.head(self.body(self.whiten(x))) / 9


class Run:
    """The state of a training, and its steps."""

    def __init__(self, split, classes: int, options: argparse.Namespace):
        self.x, self.y, self.batch = normal(split.images), split.labels.long(), options.batch
        self.net = Net(classes, self.x[:5000]).to(memory_format=torch.channels_last)
        per_epoch = len(self.x) // self.batch
        self.steps = -int(-per_epoch * options.epochs // 1)
        scale = 1024 * (1 + 1 / (1 - MOMENTUM))
        self.rates = [BIAS_RATE * RATE / scale, RATE / scale]
        named = [(name, p) for name, p in self.net.named_parameters() if p.requires_grad]
        fast = [name.startswith("body") and name.endswith("bias") for name, _ in named]
        groups = [
            {"params": [p for (_, p), f in zip(named, fast, strict=True) if f == wanted],
             "lr": rate, "weight_decay": DECAY * self.batch / scale / rate}
            for wanted, rate in zip((True, False), self.rates, strict=True)
        ]  # fmt: skip
        self.optimizer = torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True)
        self.average = {name: x.clone() for name, x in self.net.state_dict().items()}
        self.padded = pad(self.x, (2,) * 4, mode="reflect")
        self.mirrored = torch.rand(len(self.x)) < 0.5
        self.step = self.epoch = 0

    def images(self, chosen: Tensor) -> Tensor:
        """Shifted by up to two pixels; mirrored in every other epoch, half of them in the first."""
        right, down = torch.randint(0, 5, (len(chosen),)), torch.randint(0, 5, (len(chosen),))
        side = torch.arange(self.x.shape[-1])
        rows, columns = (down[:, None] + side)[:, :, None], (right[:, None] + side)[:, None, :]
        x = self.padded[chosen[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
        turned = self.mirrored[chosen] ^ bool(self.epoch % 2)
        return torch.where(turned[:, None, None, None], x.flip(-1), x)

    def learn(self) -> tuple[float, float]:
        """An epoch, or what is left of the last one -> loss and accuracy as the weights moved."""
        self.net.train()
        self.net.whiten.bias.requires_grad = self.epoch < BIAS_EPOCHS
        losses, right, order = [], [], torch.randperm(len(self.x))
        for chosen in order[: len(order) // self.batch * self.batch].split(self.batch):
            for each, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                each["lr"] = self.share() * rate
            logits = self.net(self.images(chosen))
            loss = cross_entropy(logits, self.y[chosen], label_smoothing=SMOOTHING, reduction="sum")
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            losses.append(loss.item() / len(chosen))
            right.append((logits.argmax(1) == self.y[chosen]).float().mean().item())
            if self.step % AVERAGE_EVERY == 0:
                self.look_ahead(AVERAGE * (self.step / self.steps) ** 3)
            if self.step == self.steps:
                self.look_ahead(1.0)
                break
        self.epoch += 1
        return sum(losses) / len(losses), sum(right) / len(right)

    def share(self) -> float:
        """Of the highest rate, now."""
        highest = max(1, int(PEAK * self.steps))
        if self.step < highest:
            return FIRST + (1 - FIRST) * self.step / highest
        return 1 - (1 - LAST) * (self.step - highest) / (self.steps - highest)

    @torch.no_grad()
    def look_ahead(self, kept: float) -> None:
        """The average keeps so much of itself, and the weights become the average."""
        for name, x in self.net.state_dict().items():
            if x.is_floating_point():
                x.copy_(self.average[name].lerp_(x, 1 - kept))

    @torch.no_grad()
    def right(self, split) -> list[float]:
        """Per cent: plain, with mirrored copies, with mirrored and shifted ones."""
        self.net.eval()
        found = torch.zeros(3)
        for images, labels in zip(split.images.split(500), split.labels.split(500), strict=True):
            x = normal(images)
            n, wide = x.shape[-1], pad(x, (1,) * 4, mode="reflect")
            plain, both = self.net(x), self.with_mirrored(x)
            shifted = [self.with_mirrored(wide[:, :, i : i + n, i : i + n]) for i in (0, 2)]
            answers = (plain, both, both / 2 + sum(shifted) / 4)
            found += torch.stack([(a.argmax(1) == labels).sum() for a in answers])
        return [round(100 * x, 2) for x in (found / len(split.labels)).tolist()]

    def with_mirrored(self, x: Tensor) -> Tensor:
        return (self.net(x) + self.net(x.flip(-1))) / 2

    HELD = ("average", "mirrored", "step", "epoch")

    def state(self) -> dict:
        held = {name: getattr(self, name) for name in self.HELD}
        parts = {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**held, **parts, "random": torch.get_rng_state()}

    def resume(self, state: dict) -> None:
        for name in self.HELD:
            setattr(self, name, state[name])
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])


def normal(images: Tensor) -> Tensor:
    """(B, 3, S, S) of bytes (B, S, S, 3)."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=9.9)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    data = load_dataset(options.data)
    run = Run(data.train, len(data.classes), options)
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "state.pt"
    if kept.is_file():
        run.resume(torch.load(kept))
    began = time.perf_counter()
    while run.step < run.steps:
        loss, right = run.learn()
        row = {"epoch": run.epoch, "step": run.step, "loss": loss, "train": 100 * right}
        if run.step == run.steps:
            row["test"], row["mirrored"], row["shifted"] = run.right(data.test)
        row["minutes"] = (time.perf_counter() - began) / 60
        print(json.dumps(row), flush=True)
        with open(options.out / "rows.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        torch.save(run.state(), kept.with_suffix(".new"))
        kept.with_suffix(".new").replace(kept)


if __name__ == "__main__":
    main()
