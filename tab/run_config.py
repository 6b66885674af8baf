"""What one run is: the options of a recipe, resolved and checked; see tab/recipe/recipes.

No option has a default here: a recipe states each one, or inherits it from its `base`.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Literal

from .checks import between, check_keys, check_type, positive


@dataclass(frozen=True)
class Train:
    epochs: int
    batch_size: int
    lr: float  # the constant rate, or the peak of the cycle
    weight_decay: float
    schedule: Literal["constant", "one_cycle"]
    # first_epoch: later ones run in eval mode, so that batch norm stands still (a published fault)
    train_mode: Literal["always", "first_epoch"]
    label_smoothing: float
    amp: bool  # bfloat16 autocast, on a GPU only: CPUs often emulate it
    compile: bool  # the model through torch.compile
    graph: bool  # a step as a CUDA graph, on a GPU only

    def __post_init__(self):
        positive(self, "train", "epochs", "batch_size", "lr")
        between(self, "train", "label_smoothing", 0, 0.999)
        between(self, "train", "weight_decay", 0, 1)


@dataclass(frozen=True)
class Data:
    images: int  # training images used, stratified; 0: all
    validation: int  # held out of the training set, stratified
    normalise: Literal["train", "each"]  # test images by training statistics, or by their own
    translate: int  # pixels, at most, in each direction
    flip: bool
    drop_last: bool

    def __post_init__(self):
        between(self, "data", "images", 0, 10**9)
        between(self, "data", "validation", 0, 10**9)
        between(self, "data", "translate", 0, 31)


@dataclass(frozen=True)
class Evaluate:
    # Scored each epoch. validation: the test set once, at the end; validation_only: never.
    split: Literal["test", "validation", "validation_only"]
    batch_size: int

    def __post_init__(self):
        positive(self, "evaluate", "batch_size")


@dataclass(frozen=True)
class Mlp:
    hidden: int  # C, the width of a token
    forms: Literal["library", "published"]  # of each attention; see tab/layers/published.py
    match: str  # whose size the others get, by their `hidden` (size_matching.py); "": as given
    tokens: int  # the Linear's outputs are split into this many tokens
    block: Literal["replace", "residual"]  # y = A(x), or y = x + γ·A(norm(x)) with γ = 0 at first
    position: Literal["none", "learned", "rope"]
    head_layers: int  # hidden layers between the attention and the logits

    def __post_init__(self):
        positive(self, "model", "hidden", *(["tokens"] if self.tokens != "grid" else []))
        between(self, "model", "head_layers", 0, 16)


@dataclass(frozen=True)
class Cnn(Mlp):
    tokens: int | Literal["grid"]  # "grid": one token a cell of the last feature map
    stem: Literal["pool", "stride"]  # conv-BN-ReLU-maxpool twice, or two convolutions of stride 2
    channels: int  # of the first convolution; the second has C on the grid, else twice as many

    def __post_init__(self):
        super().__post_init__()
        positive(self, "model", "channels")


@dataclass(frozen=True)
class Resnet9(Mlp):
    tokens: Literal["grid"]
    channels: int  # of the first convolution; then 2×, 4×, and C
    cells: Literal[4, 8]  # rows and columns of the last feature map

    def __post_init__(self):
        super().__post_init__()
        positive(self, "model", "channels")


MODELS: dict[str, type[Mlp]] = {"mlp": Mlp, "cnn": Cnn, "resnet9": Resnet9}
SECTIONS = {"train": Train, "data": Data, "evaluate": Evaluate}


@dataclass(frozen=True)
class RunConfig:
    """One run of one variant with one seed; nothing is left to look up."""

    recipe: str
    model: str
    attention: str
    seed: int
    train: Train
    data: Data
    evaluate: Evaluate
    model_options: Mlp
    attention_options: dict[str, object]

    @property
    def id(self) -> str:
        return f"{self.model}-{self.attention}-s{self.seed}"

    @property
    def draws(self) -> int:
        """The seed of all that is drawn in this run: weights, order, augmentation, noise. It is
        the seed, but for a second control, which has to differ from the first in just this."""
        return self.seed + self.attention_options.get("seed_shift", 0)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: dict) -> RunConfig:
        """The inverse of `to_dict`, with every check of a recipe."""
        check_keys("a run", d, [f.name for f in dataclasses.fields(cls)], complete=True)
        sections = {name: options(kind, name, d[name]) for name, kind in SECTIONS.items()}
        model = options(model_class(d["model"]), f"model.{d['model']}", d["model_options"])
        return cls(**{**d, **sections, "model_options": model})


def model_class(name: str) -> type[Mlp]:
    check_keys("the models", [name], MODELS)
    return MODELS[name]


def options(kind: type, where: str, given: dict):
    """`kind(**given)` after checking names, types and completeness."""
    hints = typing.get_type_hints(kind)
    check_keys(where, given, hints, complete=True)
    return kind(**{key: check_type(f"{where}.{key}", given[key], hints[key]) for key in hints})
