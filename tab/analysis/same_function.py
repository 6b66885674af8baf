"""Which variants are the same function at the sizes of a recipe: measured, not looked up.

Two layers are compared on the same weights: what has one name and one shape in both is copied from
the first to the second, all else is drawn at random in both, and both see the same random tokens,
in float64 and eval mode. If the outputs agree then, no value of what they do not share matters.
Widths may differ between variants of a recipe; a pair is then compared at a width that both take.

Of each model two more things are measured, behind its backbone: which parameters do no more than
add one and the same vector to the logits of every image, which the last bias does already; and
whether tokens meet, or what the head reads of them is a sum of functions of one token each. A mix
of tokens that is linear, under a mean over the tokens, is such a sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..layers import Attention, attention_options
from ..models.image_model import build_layer, build_model, parameter_count, tokens_of
from ..models.parts import POOLS
from ..recipe.recipe import Recipe
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


@dataclass(frozen=True)
class Alike:
    """Variants of one model that are the same function."""

    model: str
    attentions: tuple[str, ...]
    difference: float  # the largest that was measured, relative to the largest output
    but: str = ""  # an option that must be made equal first: "num_heads"
    tie: bool = False  # with one seed they also start as the same function: training must tie


@dataclass(frozen=True)
class Identity:
    """What the check found: each layer by itself, and those that are alike."""

    layers: list[Layer]
    alike: list[Alike]
    failed: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)  # what it raised

    def twins(self) -> list[Alike]:
        """Those that are the same function as they stand."""
        return [group for group in self.alike if not group.but]


def identity(
    recipe: Recipe,
    models: Sequence[str],
    attentions: Sequence[str],
    *,
    seed: int = 0,
    classes: int = 10,
    progress: Callable[[int, int, str], None] | None = None,
) -> Identity:
    """The check, for each model by itself. A layer that raises is left out, and named in `failed`:
    its run will tell, and the others go on. progress: told (done, total, what)."""
    layers, alike, failed = [], [], {}
    show, total = progress or (lambda *_: None), len(models) * (len(attentions) + 1)
    for i, model in enumerate(models):
        configs, start = [], i * (len(attentions) + 1)
        for j, attention in enumerate(attentions):
            show(start + j, total, f"{model}-{attention}")
            try:
                config = recipe.run_config(model, attention, seed, classes=classes)
                biases, meet = _in_the_model(config, classes)
                layers.append(replace(_measured(config), biases=biases, meet=meet))
                configs.append(config)
            except Exception as error:
                failed[model, attention] = f"{type(error).__name__}: {error}"
        show(start + len(attentions), total, f"pairs of {model}")
        groups = _groups(configs)
        alike += [group for group, _ in groups if len(group.attentions) > 1]
        alike += _but_for_heads([members[0] for _, members in groups])
    return Identity(layers, alike, failed)


# --- one layer ------------------------------------------------------------------------------------


def _measured(config: RunConfig) -> Layer:
    layer, n, c = build_layer(config).double(), tokens_of(config), config.model_options.hidden
    count = max(4, 256 // n)  # images: tokens enough to reach every expert
    x, y, r = _random(3, count, n, c, seed=1)
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
        apart = _apart(layer((x + y) / 2), (layer(x) + layer(y)) / 2)
    return Layer(
        model=config.model,
        attention=config.attention,
        width=c,
        tokens=n,
        parameters=parameter_count(layer),
        idle=_idle(layer),
        affine=apart < NEAR,
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
    n, c = tokens_of(config), config.model_options.hidden
    a, b = _random(2, 4, n, c, seed=5)
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
    apart = (crossed - one - two).abs().max() / (one - two).abs().max()
    return tuple(biases), n > 1 and apart.item() > NEAR


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


# --- two layers -----------------------------------------------------------------------------------


def _groups(configs: list[RunConfig]) -> list[tuple[Alike, list[RunConfig]]]:
    """The variants by function, in their order; the first of a group stands for it."""
    groups: list[list[RunConfig]] = []
    worst: list[float] = []
    for config in configs:
        for i, members in enumerate(groups):
            apart = _difference(members[0], config)
            if apart is not None and apart < NEAR:
                members.append(config)
                worst[i] = max(worst[i], apart)
                break
        else:
            groups.append([config])
            worst.append(0.0)
    return [
        (
            Alike(
                model=members[0].model,
                attentions=tuple(config.attention for config in members),
                difference=apart,
                tie=len(members) > 1 and all(_starts_equal(members[0], m) for m in members[1:]),
            ),
            members,
        )
        for members, apart in zip(groups, worst, strict=True)
    ]


def _but_for_heads(first: list[RunConfig]) -> list[Alike]:
    """Pairs of different functions that a common number of heads makes the same."""
    alike = []
    for i, b in enumerate(first):
        for a in first[:i]:
            heads = _heads(a), _heads(b)
            if None in heads or heads[0] == heads[1]:
                continue
            other = b.attention_options | {"num_heads": heads[0]}
            apart = _difference(a, dataclasses.replace(b, attention_options=other))
            if apart is not None and apart < NEAR:
                names = (a.attention, b.attention)
                alike.append(Alike(a.model, names, apart, but="num_heads"))
    return alike


def _heads(config: RunConfig) -> int | None:
    published = config.model_options.forms == "published"
    known = attention_options(config.attention, published=published)
    return {**known, **config.attention_options}.get("num_heads")


def _difference(a: RunConfig, b: RunConfig) -> float | None:
    """Largest difference of outputs on the same weights; None if no width suits both."""
    for width in dict.fromkeys((a.model_options.hidden, b.model_options.hidden)):
        try:
            one, two = (_at(config, width).double().eval() for config in (a, b))
        except (ValueError, RuntimeError):  # such as heads that do not divide it
            continue
        (x,) = _random(1, 2, tokens_of(a), width, seed=2)
        _share(one, two)
        with torch.no_grad():
            return _apart(one(x), two(x))
    return None


def _at(config: RunConfig, width: int) -> Attention:
    options = dataclasses.replace(config.model_options, hidden=width)
    return build_layer(dataclasses.replace(config, model_options=options))


@torch.no_grad()
def _share(one: Attention, two: Attention) -> None:
    """Copies what both have from one to two and draws the rest of both at random.

    A layer inside another counts: qkv.weight is the partner of attention.qkv.weight.
    """
    free = dict(one.named_parameters())
    generator = torch.Generator().manual_seed(3)
    rest = []
    for name, p in two.named_parameters():
        partner = next(
            (k for k, q in free.items() if _partners(k, name) and q.shape == p.shape), ""
        )
        if partner:
            p.copy_(free.pop(partner))
        else:
            rest.append(p)
    for p in (*free.values(), *rest):
        p.copy_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def _partners(a: str, b: str) -> bool:
    return a == b or a.endswith(f".{b}") or b.endswith(f".{a}")


def _starts_equal(a: RunConfig, b: RunConfig) -> bool:
    """With one seed, before any step, at the widths of the recipe; a second control that draws
    otherwise does not."""
    if a.draws != b.draws or a.model_options.hidden != b.model_options.hidden:
        return False
    (x,) = _random(1, 2, tokens_of(a), a.model_options.hidden, seed=4)
    with torch.no_grad():
        one, two = (build_layer(config).double().eval()(x) for config in (a, b))
    return _apart(one, two) < NEAR


def _apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


def _random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
