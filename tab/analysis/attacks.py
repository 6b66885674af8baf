"""Adversarial images: FGSM and PGD, L∞, in pixel space, and whether their gradients can be trusted.

FGSM (Goodfellow et al. 2015): x + ε·sign ∇ₓL. PGD (Madry et al. 2018): from a random point of the
ε-ball, `steps` times x ← Π(x + α·sign ∇ₓL), Π onto the ball and onto 0…1. Both know the model.
An attack that fails does not prove a robust model: gradients can be masked (Athalye et al. 2018,
section 3.1, whose signs are `suspicions`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.batches import Batches
from ..data.load import hold_out

EPSILON, ALPHA, STEPS = 8 / 255, 2 / 255, 20
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
    labels = test.labels.cpu()
    index = torch.arange(len(labels))
    if images < len(labels):
        index = hold_out(labels, images, seed=seed)[1]
    mean, scale = (part.view(1, 3, 1, 1) for part in (test.mean, test.scale))

    def logits(x: Tensor) -> Tensor:
        return model(((x * 255 - mean) * scale).contiguous(memory_format=torch.channels_last))

    generator = torch.Generator().manual_seed(seed)
    right = dict.fromkeys(("clean", "fgsm", "pgd", "random", "large"), 0)
    zero = 0
    for part in index.split(test.batch_size):
        part = part.to(test.device)
        x, y = test.images[part].permute(0, 3, 1, 2).float() / 255, test.labels[part]
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


def suspicions(found: dict) -> list[str]:
    """Signs of masked gradients that were seen; none proves nothing."""
    signs = {
        "PGD does less than FGSM": found["pgd"] > found["fgsm"] + SLACK,
        "FGSM does less than chance": found["fgsm"] > found["random"] + SLACK,
        "an attack without a bound fails": found["large"] > SLACK,
        "gradients vanish": found["zero_gradients"] > SLACK,
    }
    return [words for words, seen in signs.items() if seen]
