"""The identity check in words, and in the table of report.md."""

from __future__ import annotations

import numpy as np

from ..analysis.one_variant import Layer
from ..analysis.same_function import Alike, Identity
from ..compare.runs import Run
from .tables import markdown_lines
from .text import plain, title

COLUMNS = {
    "Model": lambda layer, _: layer.model.upper(),
    "Attention": lambda layer, _: title(layer.attention),
    "Width": lambda layer, _: str(layer.width),
    "Tokens": lambda layer, _: str(layer.tokens),
    "Parameters": lambda layer, _: f"{layer.parameters:,}",
    "No gradient": lambda layer, _: ", ".join(layer.idle) or "–",
    "Affine": lambda layer, _: "yes" if layer.affine else "no",
    "Only a bias": lambda layer, _: ", ".join(layer.biases) or "–",
    "Tokens meet": lambda layer, _: "yes" if layer.meet else "no",
    "Noise": lambda layer, _: "in training" if layer.noisy else "–",
    "Same function as": lambda layer, found: _others(layer, found),
}


def sentences(found: Identity) -> list[str]:
    """What follows from the measurements; one sentence says so if nothing does."""
    noisy = {(layer.model, layer.attention) for layer in found.layers if layer.noisy}
    text = [_group(group, noisy) for group in found.alike]
    if not found.twins():
        text.insert(0, "No two variants are the same function.")
    for model in dict.fromkeys(layer.model for layer in found.layers):
        mine = [layer for layer in found.layers if layer.model == model]
        text += _about(model.upper(), mine)
    for (model, attention), error in found.failed.items():
        text.append(f"{model.upper()}: {title(attention)} could not be checked: {error}")
    return text


def _group(group: Alike, noisy: set[tuple[str, str]]) -> str:
    names = _names(group.attentions)
    head = f"{group.model.upper()}: {names} are the same function on the same weights"
    if group.but:
        head += f" when {group.but} is equal"
    if group.difference:
        head += f" (outputs differ by {group.difference:.0e} of the largest)"
    with_noise = [name for name in group.attentions if (group.model, name) in noisy]
    if with_noise:
        head += f", but for the noise of {_names(with_noise)} in training"
    elif group.tie:
        head += "; with one seed they start equal, so they must tie, and what parts them is noise"
    return f"{head}."


def _about(model: str, layers: list[Layer]) -> list[str]:
    text, one = [], [layer.attention for layer in layers if layer.tokens == 1]
    if one:
        text.append(f"{model}: one token, which can attend to nothing but itself.")
    affine = [layer.attention for layer in layers if layer.affine and layer.parameters]
    if affine:
        of = "a token" if one else "the tokens"
        text.append(f"{model}: no more than one affine map of {of}: {_names(affine)}.")
    apart = [layer.attention for layer in layers if not layer.meet and layer.tokens > 1]
    if apart:
        text.append(
            f"{model}: what the head reads is a sum of functions of single tokens, where no token "
            f"meets another: {_names(apart)}."
        )
    biases: dict[tuple[str, ...], list[str]] = {}
    for layer in layers:
        if layer.biases:
            biases.setdefault(layer.biases, []).append(layer.attention)
    for parts, of in biases.items():
        text.append(
            f"{model}: no more than a bias of the logits, the same for every image: "
            f"{', '.join(parts)} of {_names(of)}."
        )
    idle: dict[tuple[str, ...], list[str]] = {}
    for layer in layers:
        if layer.idle:
            idle.setdefault(layer.idle, []).append(layer.attention)
    if idle:
        which = "; ".join(f"{', '.join(parts)} of {_names(of)}" for parts, of in idle.items())
        text.append(f"{model}: no gradient reaches {which}.")
    return text


def identity_section(found: Identity, runs: list[Run]) -> str:
    """For report.md; with how far apart the names of one function came out in these runs."""
    points = [*sentences(found), *(_spread(group, runs) for group in found.twins())]
    lines = [[show(layer, found) for show in COLUMNS.values()] for layer in found.layers]
    how = (
        "Measured before any training, in float64 and eval mode: shared weights copied, others "
        "drawn at random. Affine: A((x + y)/2) = (A(x) + A(y))/2. Only a bias: a change of the "
        "parameter adds the same to the logits of every image. Tokens meet: what the head reads is "
        "no sum of functions of single tokens."
    )
    listed = "\n".join(f"- {plain(point)}" for point in points if point)
    return "\n\n".join(["## Identity check", how, listed, markdown_lines([*COLUMNS], lines)])


def _spread(group: Alike, runs: list[Run]) -> str:
    means = []
    for attention in group.attentions:
        mine = [r for r in runs if (r.model, r.attention) == (group.model, attention) and r.scored]
        if mine:
            means.append(float(np.mean([r.summary["final_test_accuracy"] for r in mine])))
    if len(means) < 2:
        return ""
    return (
        f"{group.model.upper()}: in this comparison the {len(means)} names of one function scored "
        f"{100 * min(means):.1f} to {100 * max(means):.1f} % on the test set."
    )


def _others(layer: Layer, found: Identity) -> str:
    for group in found.twins():
        if group.model == layer.model and layer.attention in group.attentions[1:]:
            return title(group.attentions[0])
    return "–"


def _names(attentions) -> str:
    *most, last = map(title, attentions)
    return f"{', '.join(most)} and {last}" if most else last
