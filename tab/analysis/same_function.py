"""Which variants are the same function at the sizes of a recipe: measured, not looked up.

Two layers are compared on the same weights: what has one name and one shape in both is copied from
the first to the second, all else is drawn at random in both, and both see the same random tokens,
in float64 and eval mode. If the outputs agree then, no value of what they do not share matters.
Widths may differ between variants of a recipe; a pair is then compared at a width that both take.

What is measured of each variant by itself stands in one_variant.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..layers import Attention, attention_options
from ..models.image_model import build_layer
from ..recipe.recipe import Recipe
from ..run_config import RunConfig
from .one_variant import NEAR, Layer, apart, measured, normal


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
                layers.append(measured(config, classes))
                configs.append(config)
            except Exception as error:
                failed[model, attention] = f"{type(error).__name__}: {error}"
        show(start + len(attentions), total, f"pairs of {model}")
        groups = _groups(configs)
        alike += [group for group, _ in groups if len(group.attentions) > 1]
        alike += _but_for_heads([members[0] for _, members in groups])
    return Identity(layers, alike, failed)


# --- two layers -----------------------------------------------------------------------------------


def _groups(configs: list[RunConfig]) -> list[tuple[Alike, list[RunConfig]]]:
    """The variants by function, in their order; the first of a group stands for it."""
    groups: list[list[RunConfig]] = []
    worst: list[float] = []
    for config in configs:
        for i, members in enumerate(groups):
            gap = _difference(members[0], config)
            if gap is not None and gap < NEAR:
                members.append(config)
                worst[i] = max(worst[i], gap)
                break
        else:
            groups.append([config])
            worst.append(0.0)
    return [
        (
            Alike(
                model=members[0].model,
                attentions=tuple(config.attention for config in members),
                difference=gap,
                tie=len(members) > 1 and all(_starts_equal(members[0], m) for m in members[1:]),
            ),
            members,
        )
        for members, gap in zip(groups, worst, strict=True)
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
            gap = _difference(a, dataclasses.replace(b, attention_options=other))
            if gap is not None and gap < NEAR:
                names = (a.attention, b.attention)
                alike.append(Alike(a.model, names, gap, but="num_heads"))
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
        (x,) = normal(1, 2, a.tokens, width, seed=2)
        _share(one, two)
        with torch.no_grad():
            return apart(one(x), two(x))
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
    (x,) = normal(1, 2, a.tokens, a.model_options.hidden, seed=4)
    with torch.no_grad():
        one, two = (build_layer(config).double().eval()(x) for config in (a, b))
    return apart(one, two) < NEAR
