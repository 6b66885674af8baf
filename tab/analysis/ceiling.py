"""What a model of a generated task cannot answer, whatever it learns: known before it is trained.

Two things keep an answer from where it is asked for.

    the pattern    Values are independent: one that does not reach the place that asks can only be
                   guessed. With the share r of questions whose answer does, no training goes beyond
                   r + (1 − r)/16. Which places a place hears is measured on the untrained model, by
                   changing one value after the other. Where larger weights on another sequence hear
                   more, what the layer leaves out is its own choice, which it learns: no limit.
    the weights    A layer that is no attention mixes by weights that do not look at keys, and one
                   whose weights are the same for every place cannot copy either. In one block, key
                   and value then arrive in two separate sums, from which at best the most common
                   value can be told. (The norm before the layer joins the two a little, so that
                   this is no theorem: the table shows what was found.)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.sequences import VALUES, SequenceSplit, answer_places, most_common
from ..layers import get_attention
from ..models.image_model import build_model
from ..run_config import RunConfig

PLACES = 64  # whose values are changed: all of 128 tokens, a sample of more
AT_ONCE = 16  # changed sequences in one forward pass
LARGER = 3.0  # so that a choice by content falls otherwise than at first
STILL = 1e-9  # a change of a logit below this is rounding, in float64


@dataclass(frozen=True)
class Ceiling:
    """accuracy: what at most can be expected. why: what keeps the answers away; "" if nothing."""

    accuracy: float
    why: str = ""


def ceiling(config: RunConfig, split: SequenceSplit) -> Ceiling:
    """Of this run's model on the task of `split`."""
    model = build_model(config, VALUES).double().eval()
    reached = reach(model, split)
    pattern = Ceiling(reached + (1 - reached) / VALUES, "" if reached == 1 else "out of reach")
    if config.model_options.depth > 1:  # blocks may join what one block keeps apart
        return pattern
    guess = Ceiling(most_common(split), "blind to keys")
    keyed = bool(split.tokens[..., 0].any())
    if not keyed:
        guess = Ceiling(guess.accuracy, "blind to places")
    blind = not get_attention(config.attention).is_attention and (keyed or _alike(model, split))
    return min(pattern, guess, key=lambda c: c.accuracy) if blind else pattern


@torch.no_grad()
def reach(model: nn.Module, split: SequenceSplit) -> float:
    """The share of questions whose answer can reach the place that asks, in a model in float64."""
    n, asked = split.tokens.shape[1], split.labels.shape[1]
    draw = torch.Generator().manual_seed(0)
    places = torch.randperm(n - asked, generator=draw)[:PLACES].sort().values
    hears = _hears(model, split.tokens[0], places, asked)
    larger = copy.deepcopy(model)
    for p in larger.parameters():
        p.mul_(LARGER if p.dim() > 1 else 1)
    if (_hears(larger, split.tokens[1], places, asked) & ~hears).any():
        return 1.0
    where = answer_places(SequenceSplit(split.tokens[:256], split.labels[:256]))  # (M, Q)
    tried = torch.isin(where, places)
    question = torch.arange(asked).expand_as(where)
    return hears[question[tried], where[tried]].double().mean().item()


def _hears(model: nn.Module, base: Tensor, places: Tensor, asked: int) -> Tensor:
    """base (N, 2) -> (Q, N): whether a question's logits move with the value at a place."""
    found = torch.zeros(asked, len(base), dtype=torch.bool)
    before = model(base[None])[:, -asked:]
    for part in places.split(AT_ONCE):
        x = base.repeat(len(part), 1, 1)
        i = torch.arange(len(part))
        x[i, part, 1] = (x[i, part, 1] + 1) % VALUES
        moved = (model(x)[:, -asked:] - before).abs().amax(-1) > STILL  # (P, Q)
        found[:, part] = moved.T
    return found


@torch.no_grad()
def _alike(model: nn.Module, split: SequenceSplit) -> bool:
    """Whether the layer gives every place the same weights."""
    tokens: Tensor = model.tokens(split.tokens[:1])
    weights = model.attention.attention_matrix(tokens)  # (1, H, N, N)
    return torch.allclose(weights, weights[..., :1, :].expand_as(weights))
