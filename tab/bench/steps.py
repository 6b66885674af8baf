"""`tab bench steps`: whole training steps of the study's models, images per second.

A step is what training does with one batch: forward, loss, backward, AdamW, `after_step`. The
batch stays the same and is made of noise, so assembling it takes no part (bench/bench_batches.py
times that). Contestants at one model, in turns:

    none            the control: no attention
    tab NAME        the model with that mechanism
    eager NAME      its twin: the same weights, but the attention function of the layer is the one
                    of eager.py, in plain PyTorch; everything around it is the same code

A mechanism whose layer runs no kernel of TAB (multi_head, linformer, …) is PyTorch already and has
no twin. The experts of deepseek_mla are such a part, in both. A twin whose attention or gradients
differ from the layer's is not timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..layers.deepseek_mla import DeepSeekMLA
from ..layers.linear import LinearAttention
from ..layers.local import LocalAttention
from ..layers.performer import PerformerAttention
from ..layers.sparse import SparseAttention
from ..models.image_model import ImageModel, build_model
from ..ops.local import in_window
from ..recipe.recipe import Recipe
from ..train.steps import Steps
from ..train.training_run import place
from . import eager
from .measure import Row, take_turns, worst_of

CLASSES = 10
TOLERANCE = 1e-3  # of the largest value, float32
SCHEDULE = 10**6  # steps of the learning rate's schedule: more than are ever timed


def steps(
    recipe: Recipe,
    model: str,
    attentions: list[str],
    *,
    batch: int | None = None,
    device: str = "cpu",
    budget: float = 3.0,
    min_rounds: int = 5,
    max_rounds: int = 50,
) -> list[Row]:
    """The control, then each mechanism and its twin; seconds["step"]. batch: else the recipe's."""
    generator = torch.Generator().manual_seed(0)
    batch = batch or recipe.run_config(model, "none", 0).train.batch_size
    x = torch.randn(batch, 3, 32, 32, generator=generator).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, CLASSES, (batch,), generator=generator).to(device)
    case = f"steps/{model}/{recipe.name}/b{batch}"
    rows, calls = [], {}
    for name in ["none", *(a for a in attentions if a != "none")]:
        config = recipe.run_config(model, name, 0)
        ours = place(build_model(config, CLASSES), torch.device(device))
        contestants = {name if name == "none" else f"tab {name}": ours}
        other = twin(ours)
        errors: tuple[float | None, float | None] = (None, None)
        if other is not None:
            errors = difference(ours, other, x)
            contestants[f"eager {name}"] = other
        for label, net in contestants.items():
            row = Row(case, label, batch=batch)
            rows.append(row)
            if label.startswith("eager"):
                row.error, row.gradient_error = errors
                if not (worst := worst_of(errors)) <= TOLERANCE:
                    row.skipped = f"wrong: differs from the layer by {worst:.1e}"
                    continue
            learn = Steps(net, config.train, SCHEDULE, torch.device(device)).learn
            calls[label] = (lambda: None, lambda _, learn=learn: learn([(x, y)]))
    times, pace = take_turns(calls, device, budget, min_rounds, max_rounds, None, 0)
    for row in rows:
        if row.contestant in times:
            row.timed("step", times[row.contestant], pace)
    return rows


# --- twins ----------------------------------------------------------------------------------------


def twin(model: ImageModel) -> ImageModel | None:
    """A copy whose layer attends by eager.py; None where there is nothing to swap."""
    other = copy.deepcopy(model)
    layer = other.attention
    if isinstance(layer, DeepSeekMLA):
        latent = layer.attention

        def forward(x, key_mask=None, max_logits=False):
            o = eager.mla(*latent.project(x), latent.w_uk, latent.w_uv)
            return latent.out(o.transpose(1, 2).flatten(2)), None

        latent.forward = forward
        return other
    rule = _attend(layer)
    if rule is None:
        return None
    layer.attend = lambda q, k, v, key_mask: rule(q, k, v)
    return other


def _attend(layer: nn.Module) -> Callable[..., Tensor] | None:
    """q, k, v (B, H, N, D) -> (B, H, N, D), what `layer.attend` computes."""
    device = next(layer.parameters()).device if any(True for _ in layer.parameters()) else None
    if isinstance(layer, LinearAttention):
        return lambda q, k, v: eager.linear(q, k, v, feature_map=layer.map)
    if isinstance(layer, PerformerAttention) and layer.kernel == "softmax":
        return lambda q, k, v: eager.performer(q, k, v, layer.projection)
    if isinstance(layer, LocalAttention):
        i = torch.arange(layer.seq_len, device=device)
        cols = layer.window_grid[1] if layer.window_grid else 0
        mask = in_window(i[:, None], i, layer.reach, layer.reach, cols, False)  # (N, N)
        return lambda q, k, v: eager.masked(q, k, v, mask=mask)
    if isinstance(layer, SparseAttention):
        mask = layer.pattern(layer.seq_len).to_dense().to(device)  # (Hp, N, N)
        return lambda q, k, v: eager.masked(q, k, v, mask=mask)
    return None


def difference(ours: ImageModel, other: ImageModel, x: Tensor) -> tuple[float, float]:
    """Of attention and of its gradients (tokens, parameters), relative to the largest value.

    At the attention itself: at first a residual block multiplies what it says by 0.
    """
    with torch.no_grad():
        tokens = ours.tokens(x[:8]).detach()  # (8, N, C)
    found = [_attention(model, tokens) for model in (ours, other)]
    errors = [
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        for a, b in zip(*found, strict=True)
    ]
    return errors[0], worst_of(errors[1:])


def _attention(model: ImageModel, tokens: Tensor) -> list[Tensor]:
    layer = model.attention
    layer = layer.attention if isinstance(layer, DeepSeekMLA) else layer
    tokens = tokens.clone().requires_grad_()
    out = layer(tokens)
    out = out[0] if isinstance(out, tuple) else out
    weight = torch.linspace(-1, 1, out.shape[-1], device=out.device)
    leaves = [tokens, *layer.parameters()]
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]
