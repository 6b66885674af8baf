"""What the identity check measures of one variant by itself, at the sizes of a recipe.

Of its layer, in float64: which parameters the loss does not reach, whether it is affine, and
whether two passes in training differ. Of its model, behind the backbone: which parameters do no
more than add one and the same vector to the logits of every image, which the last bias does
already; and whether tokens meet, or what the head reads of them is a sum of functions of one token
each. A mix of tokens that is linear, under a mean over the tokens, is such a sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..layers import Attention
from ..models.image_model import build_layer, build_model, parameter_count
from ..models.parts import POOLS
from ..run_config import RunConfig

NEAR = 1e-5  # largest difference, relative to the largest output, at which two outputs are one


@dataclass(frozen=True)
class Layer:
    """What was measured of one variant."""

    model: str
    attention: str
    width: int  # C
    tokens: int  # N
    parameters: int
    idle: tuple[str, ...]  # parameters that the loss does not reach
    affine: bool  # A((x + y)/2) = (A(x) + A(y))/2: no more than a linear layer
    noisy: bool  # in training, two passes differ
    biases: tuple[str, ...] = ()  # parameters of the model that are no more than a bias
    meet: bool = True  # what the head reads is no sum over single tokens


def measured(config: RunConfig, classes: int) -> Layer:
    """Everything of it."""
    biases, meet = _in_the_model(config, classes)
    return replace(_of_the_layer(config), biases=biases, meet=meet)


# --- one layer ------------------------------------------------------------------------------------


def _of_the_layer(config: RunConfig) -> Layer:
    layer, n, c = build_layer(config).double(), config.tokens, config.model_options.hidden
    count = max(4, 256 // n)  # images: tokens enough to reach every expert
    x, y, r = normal(3, count, n, c, seed=1)
    layer.train()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        output = layer(x)
        noisy = not torch.equal(output, layer(x))
    loss, extra = (output * r).sum(), layer.auxiliary_loss()
    if extra is not None:
        loss = loss + extra
    if loss.requires_grad:
        loss.backward()
    layer.eval()
    with torch.no_grad():
        bent = apart(layer((x + y) / 2), (layer(x) + layer(y)) / 2)
    return Layer(
        model=config.model,
        attention=config.attention,
        width=c,
        tokens=n,
        parameters=parameter_count(layer),
        idle=_idle(layer),
        affine=bent < NEAR,
        noisy=noisy,
    )


# --- one model ------------------------------------------------------------------------------------


class _Given(nn.Module):
    """In the place of a backbone: the tokens of these images."""

    def __init__(self, tokens: Tensor):
        super().__init__()
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens


@torch.no_grad()
def _in_the_model(config: RunConfig, classes: int) -> tuple[tuple[str, ...], bool]:
    """The parameters that are no more than a bias; whether tokens meet."""
    model = build_model(config, classes).double().eval()
    n, c = config.tokens, config.model_options.hidden
    a, b = normal(2, 4, n, c, seed=5)
    generator = torch.Generator().manual_seed(6)

    def moved(p: Tensor) -> Tensor:
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        return 0.5 * noise.to(p.dtype)

    for module in model.modules():  # gates may start at 0, and hide what is behind them
        for name in getattr(module, "gates", ()):
            if (gate := getattr(module, name)) is not None:
                gate.copy_(moved(gate))
    model.backbone = _Given(a)
    last = f"head.layers.{len(model.head.layers) - 1}.bias"
    before, biases = model(a), []
    for name, p in model.named_parameters():
        kept = p.clone()
        p.add_(moved(p))
        change = model(a) - before  # (B, classes)
        p.copy_(kept)
        size = change.abs().max()
        same = (change - change[:1]).abs().max() <= NEAR * size
        if name != last and size > NEAR * before.abs().max() and same:
            biases.append(name)
    half = torch.arange(n)[:, None] < (n + 1) // 2

    def read(tokens: Tensor) -> Tensor:
        model.backbone = _Given(tokens)
        return POOLS[model.head.pool](model.body(model.embed(tokens)))

    one, two = read(a), read(b)
    crossed = read(torch.where(half, a, b)) + read(torch.where(half, b, a))
    left = (crossed - one - two).abs().max() / (one - two).abs().max()
    return tuple(biases), n > 1 and left.item() > NEAR


# --- the parameters of a layer --------------------------------------------------------------------


def _parts(layer: Attention) -> dict[str, tuple[Tensor, slice]]:
    """Parameters by name, Q, K and V of a joint projection apart, as rows of the tensor."""
    parts = {}
    for name, p in layer.named_parameters():
        if name.endswith("qkv.weight"):
            prefix, start = name.removesuffix("qkv.weight"), 0
            for part, width in zip("QKV", layer.get_submodule(prefix[:-1]).widths, strict=True):
                parts[prefix + part] = p, slice(start, start + width)
                start += width
        elif p.requires_grad:
            parts[name.removesuffix(".weight")] = p, slice(None)
    return parts


def _idle(layer: Attention) -> tuple[str, ...]:
    largest = {
        name: 0.0 if p.grad is None else p.grad[rows].abs().max().item()
        for name, (p, rows) in _parts(layer).items()
    }
    scale = max(largest.values(), default=0.0)
    return tuple(name for name, size in largest.items() if size <= NEAR * scale)


# --- numbers --------------------------------------------------------------------------------------


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest output of a."""
    return ((a - b).abs().max() / a.abs().max()).item()


def normal(*shape: int, seed: int) -> Tensor:
    """N(0, 1) in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
