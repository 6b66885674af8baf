"""Adversarial images: FGSM and PGD, L∞, in pixel space, and whether their gradients can be trusted.

FGSM (Goodfellow et al. 2015): x + ε·sign ∇ₓL. PGD (Madry et al. 2018): from a random point of the
ε-ball, `steps` times x ← Π(x + α·sign ∇ₓL), Π onto the ball and onto 0…1. Both know the model.
An attack that fails does not prove a robust model: gradients can be masked (Athalye et al. 2018,
section 3.1, whose signs are `suspicions`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.batches import Batches
from ..data.load import hold_out

EPSILON, ALPHA, STEPS = 8 / 255, 2 / 255, 20
EPSILONS = tuple(e / 255 for e in (0.25, 0.5, 1, 2, 4, 8))  # at 8/255 an untrained defence is at 0
AUTO = (1 / 255, 8 / 255)  # the second is the leaderboards'
LARGE = 128 / 255  # enough to turn any image grey: an attack that works leaves nothing right
SLACK = 0.01  # of accuracy, for chance

Classifier = Callable[[Tensor], Tensor]  # pixels in 0…1 (B, 3, H, W) -> logits (B, classes)


def gradient(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
    """∇ₓ of the cross-entropy, summed over images: each has its own."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(model(x), y, reduction="sum")
    return torch.autograd.grad(loss, x)[0]


def fgsm(model: Classifier, x: Tensor, y: Tensor, epsilon: float = EPSILON) -> Tensor:
    """The fast gradient sign method (Goodfellow et al. 2015): one step of ε."""
    return (x + epsilon * gradient(model, x, y).sign()).clamp(0, 1)


def pgd(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    epsilon: float = EPSILON,
    *,
    alpha: float = ALPHA,
    steps: int = STEPS,
    generator: torch.Generator,
) -> Tensor:
    """Projected gradient descent from a random start (Madry et al. 2018)."""
    start = (2 * torch.rand(x.shape, generator=generator) - 1).to(x.device)
    low, high = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    moved = torch.clamp(x + epsilon * start, low, high)
    for _ in range(steps):
        moved = torch.clamp(moved + alpha * gradient(model, moved, y).sign(), low, high)
    return moved


def attacked(model: torch.nn.Module, test: Batches, images: int, *, seed: int = 0) -> dict:
    """Accuracies on `images` of `test` (each class its share): clean, fgsm, pgd, random (±ε by a
    coin), large (PGD with ε = 128/255); zero_gradients, a share; suspicions, a list of words.

    The model is used as it is: put it in eval mode.
    """
    index, logits = chosen(test, images, seed), classifier(model, test)
    generator = torch.Generator().manual_seed(seed)
    right = dict.fromkeys(("clean", "fgsm", "pgd", "random", "large"), 0)
    zero = 0
    for part in index.split(test.batch_size):
        x, y = pixels(test, part)
        coin = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
        spoiled = {
            "clean": x,
            "fgsm": fgsm(logits, x, y),
            "pgd": pgd(logits, x, y, generator=generator),
            "random": (x + EPSILON * coin).clamp(0, 1),
            "large": pgd(logits, x, y, LARGE, alpha=LARGE / 8, generator=generator),
        }
        zero += int((gradient(logits, x, y).flatten(1).abs().amax(1) == 0).sum())
        with torch.no_grad():
            for name, image in spoiled.items():
                right[name] += int((logits(image).argmax(-1) == y).sum())
    found = {name: count / len(index) for name, count in right.items()}
    found |= {"zero_gradients": zero / len(index), "images": len(index)}
    return found | {"suspicions": suspicions(found)}


def epsilon_curve(
    model: torch.nn.Module, test: Batches, images: int, *, seed: int = 0
) -> dict[str, object]:
    """`accuracy` on `images` of `test` under PGD at each of EPSILONS, α = ε/4, and `right`: for
    each ε which images were still answered rightly, a bit each, in hexadecimal digits.

    What fooled the model within a small ball lies within the larger ones too: only images that are
    still right are attacked again. So the curve never rises.
    """
    index, logits = chosen(test, images, seed), classifier(model, test)
    generator = torch.Generator().manual_seed(seed)
    right = torch.zeros(len(EPSILONS), len(index), dtype=torch.bool)
    for place in torch.arange(len(index)).split(test.batch_size):
        x, y = pixels(test, index[place])
        with torch.no_grad():
            left = (logits(x).argmax(-1) == y).nonzero().flatten()
        for row, epsilon in zip(right, EPSILONS, strict=True):
            if not len(left):
                break
            step = epsilon / 4
            moved = pgd(logits, x[left], y[left], epsilon, alpha=step, generator=generator)
            with torch.no_grad():
                left = left[logits(moved).argmax(-1) == y[left]]
            row[place[left.cpu()]] = True
    return _kept(right)


def auto_attacked(
    model: torch.nn.Module, test: Batches, images: int, *, seed: int = 0
) -> dict[str, object]:
    """`accuracy` on `images` of `test` under AutoAttack (Croce & Hein 2020, its authors' package,
    L∞, standard: APGD-CE, targeted APGD-DLR and FAB, Square) at each of AUTO, and `right` as in
    `epsilon_curve`."""
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        raise ImportError(
            'AutoAttack is not installed: pip install "transformer-attention-bench[autoattack]"'
        ) from None
    index, logits = chosen(test, images, seed), classifier(model, test)
    x, y = pixels(test, index)
    x = x.contiguous()
    with torch.no_grad():
        classes = logits(x[:1]).shape[1]
    if classes < 4:
        raise ValueError(
            f"AutoAttack's targeted loss needs 4 classes or more, this model has {classes}: leave "
            "it out, PGD is measured without it"
        )
    rows = []
    for epsilon in AUTO:
        attack = AutoAttack(
            lambda x: logits(_Contiguous.apply(x)), eps=epsilon, seed=seed, device=test.device
        )
        for part in (attack.apgd_targeted, attack.fab):
            part.n_target_classes = min(part.n_target_classes, classes - 1)
        with torch.random.fork_rng([test.device] if test.device.type == "cuda" else []):
            moved, _ = attack.run_standard_evaluation(x, y, batch_size=test.batch_size)
        # Counted here, not taken from the attack: within the ball, and answered by this model.
        moved = torch.clamp(moved, x - epsilon, x + epsilon).clamp(0, 1)
        with torch.no_grad():
            parts = [logits(part).argmax(-1) for part in moved.split(test.batch_size)]
        rows.append((torch.cat(parts) == y).cpu())
    right = torch.stack(rows)
    return _kept(right)


class _Contiguous(torch.autograd.Function):
    """The identity, whose gradient AutoAttack can view as rows."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g.contiguous()


def _kept(right: Tensor) -> dict[str, object]:
    """right (ε, images) bool as robustness.json holds it."""
    return {
        "accuracy": right.double().mean(1).tolist(),
        "right": [np.packbits(row.numpy()).tobytes().hex() for row in right],
        "images": right.shape[1],
    }


def still_right(found: dict) -> np.ndarray:
    """The answers that `epsilon_curve` kept → (ε, images) bool."""
    rows = [np.frombuffer(bytes.fromhex(row), np.uint8) for row in found["right"]]
    return np.array([np.unpackbits(row, count=found["images"]) for row in rows], bool)


def chosen(test: Batches, images: int, seed: int) -> Tensor:
    """Numbers of `images` test images, of each class its share."""
    labels = test.labels.cpu()
    if images >= len(labels):
        return torch.arange(len(labels))
    return hold_out(labels, images, seed=seed)[1]


def classifier(model: torch.nn.Module, test: Batches) -> Classifier:
    """The model of pixels in 0…1, normalised as `test` is."""
    mean, scale = (part.view(1, 3, 1, 1) for part in (test.mean, test.scale))
    return lambda x: model(((x * 255 - mean) * scale).contiguous(memory_format=torch.channels_last))


def pixels(test: Batches, index: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, 3, H, W) in 0…1, y (B,)."""
    index = index.to(test.device)
    return test.images[index].permute(0, 3, 1, 2).float() / 255, test.labels[index]


def suspicions(found: dict) -> list[str]:
    """Signs of masked gradients that were seen; none proves nothing."""
    signs = {
        "PGD does less than FGSM": found["pgd"] > found["fgsm"] + SLACK,
        "FGSM does less than chance": found["fgsm"] > found["random"] + SLACK,
        "an attack without a bound fails": found["large"] > SLACK,
        "gradients vanish": found["zero_gradients"] > SLACK,
    }
    return [words for words, seen in signs.items() if seen]
