"""The names of models and mechanisms: what lists of them stand for, and what there is."""

from __future__ import annotations

import dataclasses
import inspect
import re

from ..checks import check_keys
from ..layers import attention_names, attention_options, control_names, get_attention, layer_names
from ..layers._registry import OWN
from ..models.backbones import BACKBONES
from ..models.image_model import STUDY, model_names
from ..run_config import MODELS
from .recipe import PAIR_TRAIN, load_recipe, recipe_names


def variants(
    models: str | None,
    attentions: str | None,
    everything: list[str] | None = None,
    *,
    dashes: str = "--",
) -> tuple[list[str], list[str]]:
    """Models and mechanisms, of lists separated by commas. everything: what `all` mechanisms are,
    by default all attentions. dashes: in front of `models` and `attentions` in an error."""
    mine = _names(models or STUDY, {"all": model_names()})
    layers = layers_of(attentions or "all", everything)
    check_keys(f"{dashes}models", mine, MODELS)
    try:
        check_keys(f"{dashes}attentions", layers, layer_names())
    except ValueError as error:
        raise ValueError(f"{error}; {OWN}") from None
    return mine, layers


def layers_of(text: str, everything: list[str] | None = None) -> list[str]:
    """Attentions and controls: `all` stands for `everything`, `ladder` for the controls."""
    return _names(text, {"all": everything or attention_names(), "ladder": control_names()})


def _names(text: str, groups: dict[str, list[str]]) -> list[str]:
    """A list of names; the name of a group stands for those of it that are not named before."""
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        names += [x for x in groups[name] if x not in names] if name in groups else [name]
    return names


def own_options(model: str, attention: str) -> tuple[list[str], list[str], list[str]]:
    """What a variant may have otherwise than the others of a recipe: the names of options of its
    training, of its model and of its mechanism."""
    shape = [f.name for f in dataclasses.fields(MODELS[model]) if f.name != "match"]
    return PAIR_TRAIN, shape, [*attention_options(attention)]


def is_attention(name: str) -> bool:
    """What is not installed here counts as one: the controls are TAB's own."""
    try:
        return get_attention(name).is_attention
    except ValueError:
        return True


def is_control_again(name: str) -> bool:
    """The control under a second name. It is a check of the procedure, no question of the study:
    a family of its own, in which a fault is seen the soonest."""
    none = get_attention("none")
    return name != "none" and not is_attention(name) and issubclass(get_attention(name), none)


# --- what there is --------------------------------------------------------------------------------


def told_attentions() -> list[tuple[str, str, str]]:
    """(name, attention or control, what it is) of each."""
    kinds = {True: "attention", False: "control"}
    layers = {name: get_attention(name) for name in layer_names()}
    return [(name, kinds[x.is_attention], _first_line(x)) for name, x in layers.items()]


def told_models() -> list[tuple[str, str]]:
    """(name, what makes its tokens) of each."""
    return [(name, _first_line(backbone)) for name, backbone in BACKBONES.items()]


def told_recipes() -> list[tuple[str, str]]:
    """(name, title) of each that TAB brings along."""
    return [(name, load_recipe(name).title) for name in recipe_names()]


def _first_line(of: type) -> str:
    """The first sentence of what the class says of itself."""
    text = (inspect.getdoc(of) or "").split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=\.) (?=[A-Z])", text)[0]
