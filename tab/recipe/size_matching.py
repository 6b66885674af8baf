"""Variants of equal size, in one of two ways; a recipe says model.<model>.match:

    ""                        every variant is as the recipe gives it
    "block:multi_head"        all have the same backbone, width and head; what differs is the block:
                              each grows or shrinks in an option of its layer until it has as many
                              parameters as multi_head's
    "block-flops:multi_head"  … takes as many FLOPs as multi_head's
    "multi_head"              by width: each gets the `hidden` whose model has as many parameters as
                              multi_head's
    "flops:multi_head"        … whose forward pass takes as many FLOPs

**By block** (transformer blocks, block = "pre_norm") is how sizes are matched in new comparisons.
The option is one of `Attention.size_options`: the width of all heads together, of the experts, of a
hidden layer. The control `none` has none, and no layer: its block is what the others' blocks add
something to. With one seed all variants start from the same weights in all that they share, and
read the same tokens.

**By width** is how the first studies did it. `hidden` is the width of backbone, tokens and
attention alike, since the control has nothing else to widen: "equal parameters" then means another
backbone for each. At a matched width variants with one seed share the order of the data and its
augmentation, but not the weights they start from: those have other shapes. A width that a layer
refuses (heads that do not divide it) is passed over. Where few widths remain (the rotary pairs of a
mixture of experts want multiples of 16 on a grid), the layer names an option that sets its size in
finer steps (`Attention.fine_size`); it is chosen here too, unless the recipe sets it.

How near each variant came is in the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable

import torch

from ..checks import check_keys
from ..layers import attention_options, get_attention, layer_names
from ..models.flops import flops_on, forward_flops
from ..models.image_model import build_block, build_model, layer_class, parameter_count
from ..run_config import RunConfig

BLOCK, BLOCK_FLOPS = "block:", "block-flops:"


def check_match(where: str, match: str, block: str) -> None:
    """A ValueError unless `match` is one of the above, and fits the kind of block."""
    ways = ("", "flops:", BLOCK, BLOCK_FLOPS)
    names = layer_names()
    check_keys(where, [match], ["", *(f"{way}{name}" for way in ways for name in names)])
    if match.startswith((BLOCK, BLOCK_FLOPS)) and block != "pre_norm":
        raise ValueError(
            f'{where} = "{match}" matches transformer blocks, but block = "{block}"; give '
            f'block = "pre_norm", or match = "{reference_of(match)}", which matches widths'
        )


def reference_of(match: str) -> str:
    """The attention whose size the others get; "" for none."""
    return match.rpartition(":")[2]


def matched(config: RunConfig, reference: RunConfig, classes: int = 10) -> RunConfig:
    """`config`, sized so that it is as large as `reference`, by config's own rule; both with logits
    for so many classes, which weigh more in a wider model."""
    match = config.model_options.match
    if match.startswith((BLOCK, BLOCK_FLOPS)):
        cost = block_parameters_of if match.startswith(BLOCK) else block_flops_of
        return match_block(config, cost(reference), cost)
    rule = flops_of if match.startswith("flops:") else parameters_of
    cost = functools.partial(rule, classes=classes)
    return match_width(config, cost(reference), cost)


def match_block(config: RunConfig, target: int, cost: Callable[[RunConfig], int]) -> RunConfig:
    """The config with the value of its layer's size option that costs nearest to `target`; as it
    is, if the layer has none, or the recipe sets it."""
    published = config.model_options.forms == "published"
    layer = get_attention(config.attention, published=published)
    option = layer.size_option(config.attention_options)
    known = attention_options(config.attention, published=published)
    if option not in known or option in config.attention_options:
        return config

    def size(n: int) -> int:
        return cost(_with_option(config, option, n))

    def valid(n: int) -> int:
        """The next value from n on that the layer takes."""
        return _next(n, size)

    choices = [valid(n) for n in _around(target, size, valid=valid)]
    return _with_option(config, option, min(choices, key=lambda n: abs(size(n) - target)))


def _next(n: int, size: Callable[[int], int]) -> int:
    """The next value from n on for which there is a size; what is wrong with n, if there is none
    near."""
    for k in range(n, n + 257):
        with contextlib.suppress(ValueError):
            size(k)
            return k
    size(n)
    return n


def match_width(config: RunConfig, target: int, cost: Callable[[RunConfig], int]) -> RunConfig:
    """The config with the `hidden`, and fine option if any, that costs nearest to `target`."""

    def size(hidden: int) -> int:
        return cost(_with(config, hidden))

    def valid(hidden: int) -> int:
        """The next width from `hidden` on that the layer takes."""
        return _next(hidden, size)

    published = config.model_options.forms == "published"
    fine = get_attention(config.attention, published=published).fine_size
    around = _around(target, size, config.model_options.hidden, valid)
    sized = [_with(config, valid(hidden)) for hidden in around]
    layer = get_attention(config.attention, published=published)
    if fine != layer.size_option(config.attention_options):
        fine = ""  # of no effect with these options
    if not fine or fine in config.attention_options:  # there, it is the recipe's choice
        return min(sized, key=lambda config: abs(cost(config) - target))
    choices = [choice for config in sized for choice in _choices(config, fine, target, cost)]
    return min(choices, key=lambda choice: choice[:2])[2]


def _choices(
    config: RunConfig, fine: str, target: int, cost: Callable[[RunConfig], int]
) -> list[tuple[float, float, RunConfig]]:
    """This width with the two values of `fine` around `target`, each with how far it is from the
    target, in whole per cents, and how far, as a ratio, from the layer's own choice."""

    def size(n: int) -> int:
        return cost(_with_option(config, fine, n))

    own = _around(cost(config), size)[1]
    return [
        (round(abs(size(n) / target - 1), 2), abs(math.log(n / own)), _with_option(config, fine, n))
        for n in _around(target, size, own)
    ]


def _around(
    target: int,
    size: Callable[[int], int],
    near: int = 64,
    valid: Callable[[int], int] = int,
) -> tuple[int, int]:
    """Neighbours n, n + 1 from 1 on with size(n) < target ≤ size(n + 1), or (1, 2), as of valid(n);
    size grows.

    It does so about as a square. So the search, which begins at `near`, follows the line through
    the roots of the last two sizes; each third step goes half of what is left, or twice as far,
    whatever these are."""
    low, high, n, step = 1, math.inf, max(near, 2), 0
    before, last = 0, 0.0  # the width before, and the root of its part of the target
    while True:
        fits, step = valid(n), step + 1
        if (known := size(fits)) < target:
            low = fits
        else:
            high = n
        if high - low <= 1:
            return low, low + 1
        root = math.sqrt(known / target)
        rise = (root - last) / (fits - before) if fits != before else 0.0
        before, last = fits, root
        if step % 3 and rise > 0:
            guess = min(fits + (1 - root) / rise, 8 * fits, high - 1)
            n = max(math.floor(guess), low + 1)
        else:
            n = 2 * low if high == math.inf else (low + int(high)) // 2


def parameters_of(config: RunConfig, classes: int = 10) -> int:
    """The number of parameters of this run's model; the same for every seed."""
    return _measured(_same_for_every_seed(config), parameter_count, classes)


def flops_of(config: RunConfig, classes: int = 10) -> int:
    """FLOPs of its forward pass on one image; the same for every seed."""
    return _measured(_same_for_every_seed(config), forward_flops, classes)


def block_parameters_of(config: RunConfig) -> int:
    """The number of parameters of one transformer block of this run."""
    return _parameters_of_block(_same_for_every_seed(config))


def block_flops_of(config: RunConfig) -> int:
    """FLOPs of one transformer block of this run on one image."""
    return _flops_of_block(_same_for_every_seed(config))


_Known = tuple[type, str]  # the class is another where an attention was registered anew


def _same_for_every_seed(config: RunConfig) -> _Known:
    same = {k: v for k, v in config.attention_options.items() if k != "seed"}
    one = dataclasses.replace(config, seed=0, attention_options=same)
    return layer_class(config), json.dumps(one.to_dict())


def _remembered(measure: Callable[..., int]) -> Callable[..., int]:
    """`functools.cache`, of what a layer refuses too: that is asked as often."""

    @functools.cache
    def tried(*given) -> tuple[int, str | None]:
        try:
            return measure(*given), None
        except ValueError as error:
            return 0, str(error)

    @functools.wraps(measure)
    def known(*given) -> int:
        size, refusal = tried(*given)
        if refusal is not None:
            raise ValueError(refusal)
        return size

    return known


@_remembered
def _measured(config: _Known, measure: Callable[[torch.nn.Module], int], classes: int) -> int:
    run = RunConfig.from_dict(json.loads(config[1]))
    return _undrawn(lambda: measure(build_model(run, classes)))


@_remembered
def _parameters_of_block(config: _Known) -> int:
    run = RunConfig.from_dict(json.loads(config[1]))
    return _undrawn(lambda: parameter_count(build_block(run)))


@_remembered
def _flops_of_block(config: _Known) -> int:
    run = RunConfig.from_dict(json.loads(config[1]))
    shape = (1, run.tokens, run.model_options.hidden)
    return _undrawn(lambda: flops_on(build_block(run), torch.zeros(shape)))


def _undrawn(measure: Callable[[], int]) -> int:
    """`measure` where what it builds takes no memory, and is not drawn."""
    try:
        with torch.device("meta"):
            return measure()
    except (RuntimeError, NotImplementedError):  # a layer that looks at its values
        return measure()


def _with(config: RunConfig, hidden: int) -> RunConfig:
    options = dataclasses.replace(config.model_options, hidden=hidden)
    return dataclasses.replace(config, model_options=options)


def _with_option(config: RunConfig, name: str, value: int) -> RunConfig:
    options = {**config.attention_options, name: value}
    return dataclasses.replace(config, attention_options=options)
