"""`tab bench steps`: whole training steps of the study's models, images per second.

A step is what training does with one batch: forward, loss, backward, AdamW, `after_step`. The
batch stays the same and is made of noise, so assembling it takes no part (bench/bench_batches.py
times that). Contestants at one model, in turns:

    none            the control: no attention
    tab NAME        the model with that mechanism
    eager NAME      its twin: the same weights, but the layer attends in plain PyTorch, by the
                    function of tab/bench/ops/; everything around it is the same code

A mechanism whose layer runs no kernel of TAB (multi_head, linformer, …) is PyTorch already and has
no twin. The experts of deepseek_mla are such a part, in both. A twin whose attention or gradients
differ from the layer's is not timed.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..models.image_model import ImageModel, build_model
from ..recipe.recipe import Recipe
from ..train.steps import Steps
from ..train.training_run import place
from .benchmark import Benchmark
from .measure import take_turns
from .registry import benchmarks
from .rows import Row, worst_of

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
    """A copy whose layers attend in plain PyTorch; None where they run no op of TAB."""
    other = copy.deepcopy(model)
    found = [attending(layer) for layer in other.layers()]
    if None in found:
        return None
    for benchmark, part in found:
        benchmark.use_pytorch(part)
    return other


def attending(layer: nn.Module) -> tuple[Benchmark, nn.Module] | None:
    """The op that a layer runs, and the module in it that attends by it."""
    for benchmark in benchmarks().values():
        part = benchmark.part(layer)
        if part is not None:
            return benchmark, part
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
    _, part = attending(model.attention)
    tokens = tokens.clone().requires_grad_()
    out = part(tokens)
    out = out[0] if isinstance(out, tuple) else out
    weight = torch.linspace(-1, 1, out.shape[-1], device=out.device)
    leaves = [tokens, *part.parameters()]
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]
