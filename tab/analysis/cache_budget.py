"""H2O as what it is: a policy that drops keys and values of a model trained with all of them.

A trained multi_head model answers the test images while each head keeps only a budget of its N
tokens. The row "heavy" is Zhang et al. 2023's choice (half heavy hitters by the attention that they
receive, half the latest tokens); its controls keep the latest tokens alone, and tokens drawn at
random. An image has no latest token, so that "recent" is the lower right of the picture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batches import Batches
from ..functional import h2o_attention
from ..layers.basic import MultiHeadAttention
from .attacks import chosen, classifier, pixels

BUDGETS = (1.0, 0.75, 0.5, 0.25, 0.125, 0.0625)  # of the tokens
POLICIES = ("heavy", "recent", "random")
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def fits(attention: str, forms: str) -> bool:
    """Whether a run has full softmax attention whose cache can be cut; the published form of
    multi_head computes it otherwise."""
    return attention == "multi_head" and forms == "library"


def budget_curves(
    model: nn.Module, test: Batches, images: int, *, seed: int = 0
) -> dict[str, object]:
    """`accuracy`: of "heavy" at each of BUDGETS; `recent` and `random` likewise; `images`.

    The model is used as it is: put it in eval mode. At budget 1 all three are the model itself.
    """
    index = chosen(test, images, seed)
    curves = {policy: [] for policy in POLICIES}
    for policy, curve in curves.items():
        for share in BUDGETS:
            with kept(model, policy, share, seed):
                curve.append(_accuracy(model, test, index))
    heavy = curves.pop("heavy")
    return {"accuracy": heavy, **curves, "images": len(index)}


@contextlib.contextmanager
def kept(model: nn.Module, policy: str, share: float, seed: int) -> Iterator[None]:
    """Within it, every multi_head layer of `model` keeps max(1, ⌊share·N⌋) tokens a head."""
    layers = [m for m in model.modules() if isinstance(m, MultiHeadAttention)]
    if not layers:
        raise ValueError("the model has no multi_head layer whose cache could be cut")
    for place, layer in enumerate(layers):
        layer.attend = _attend(policy, share, seed + place)
    try:
        yield
    finally:
        for layer in layers:
            del layer.attend  # the class's own is seen again


def _attend(policy: str, share: float, seed: int) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        heads, n = q.shape[1:3]
        budget = max(1, int(share * n))
        if policy == "random":  # of each head, the same for every image
            generator = torch.Generator().manual_seed(seed)
            order = torch.rand(heads, n, generator=generator).argsort(1).argsort(1)
            mask = (order < budget).to(q.device)[None, :, None]  # (1, H, 1, N)
            mask = mask if key_mask is None else mask & key_mask[:, None, None]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        heavy = budget // 2 if policy == "heavy" else 0
        return h2o_attention(
            q, k, v, heavy=heavy, recent=budget - heavy, mode="exact", key_mask=key_mask
        )

    return attend


@torch.no_grad()
def _accuracy(model: nn.Module, test: Batches, index: Tensor) -> float:
    logits, right = classifier(model, test), 0
    for part in index.split(test.batch_size):
        x, y = pixels(test, part)
        right += int((logits(x).argmax(-1) == y).sum())
    return right / len(index)
