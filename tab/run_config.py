"""What one run is: the options of a recipe, resolved and checked; see tab/recipe/recipes.

A recipe states each option, or inherits it from its `base`. One that has a default here came later
than others: recipes and results from before it mean the default.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from .checks import between, check_keys, check_type, hints, positive

IMAGE = 32  # data.size where nothing says it


@dataclass(frozen=True, kw_only=True)
class Train:
    """[train]: how a model is trained."""

    epochs: int
    batch_size: int
    lr: float  # the constant rate, or the peak of the cycle
    weight_decay: float
    schedule: Literal["constant", "one_cycle"]
    # first_epoch: later ones run in eval mode, so that batch norm stands still (a published fault)
    train_mode: Literal["always", "first_epoch"]
    label_smoothing: float
    amp: bool  # bfloat16 autocast, on a GPU
    compile: bool  # the model through torch.compile
    graph: bool  # a step as a CUDA graph, on a GPU only
    # what weight decay shrinks; weights: no norm, bias, gate, position or embedding
    decay: Literal["all", "weights"] = "all"
    gate_lr_ratio: float = 1.0  # the gates γ of residual branches learn at lr times this
    # above 0: what is scored and kept is w̄ ← ema·w̄ + (1 − ema)·w, of each step
    ema: float = 0.0
    # amp on a CPU, too: two to three times as fast where it multiplies bfloat16, else slower
    amp_on_cpu: bool = False
    # sgd: with Nesterov's momentum 0.9, and weight decay in the gradient
    optimizer: Literal["adamw", "sgd"] = "adamw"

    def __post_init__(self):
        positive(self, "train", "epochs", "batch_size", "lr", "gate_lr_ratio")
        between(self, "train", "label_smoothing", 0, 0.999)
        between(self, "train", "weight_decay", 0, 1)
        between(self, "train", "ema", 0, 0.99999)
        if self.amp_on_cpu and not self.amp:
            raise ValueError(
                "train.amp_on_cpu = true says where there is autocast, but train.amp = false; give "
                "--set train.amp=true"
            )


@dataclass(frozen=True)
class Data:
    """[data]: which images, and how they are prepared."""

    images: int  # training images used, stratified; 0: all
    validation: int  # held out of the training set, stratified
    normalise: Literal["train", "each"]  # test images by training statistics, or by their own
    translate: int  # pixels, at most, in each direction
    flip: bool
    drop_last: bool
    size: int = IMAGE  # rows and columns of an image
    # How a picture of another size becomes one. crop: its short side is resized, its centre kept.
    # stretch: both sides are resized. auto: crop, but stretch at 32, as before there was a choice
    fit: Literal["auto", "crop", "stretch"] = "auto"
    # alternating: an image is mirrored in every second epoch, half of them in the first
    flip_order: Literal["random", "alternating"] = "random"
    cutout: int = 0  # rows and columns of a square in each image that is blanked
    # Of a set without test images: the share that is drawn from its images to test on
    test_share: float = 0.0

    def __post_init__(self):
        if self.flip_order == "alternating" and not self.flip:
            raise ValueError(
                'data.flip_order = "alternating" is an order of flips, but data.flip = false; give '
                "--set data.flip=true"
            )
        between(self, "data", "images", 0, 10**9)
        between(self, "data", "validation", 0, 10**9)
        between(self, "data", "size", 8, 1024)
        if self.size % 8:
            raise ValueError(
                f"data.size = {self.size}: models halve images three times; give a multiple of 8, "
                f"such as {round(self.size / 8) * 8}"
            )
        between(self, "data", "translate", 0, self.size - 1)
        between(self, "data", "cutout", 0, self.size)
        between(self, "data", "test_share", 0, 0.9)
        if self.fit == "auto":
            object.__setattr__(self, "fit", usual_fit(self.size))


def usual_fit(size: int) -> Literal["crop", "stretch"]:
    """What data.fit = "auto" means."""
    return "stretch" if size == IMAGE else "crop"


@dataclass(frozen=True)
class Evaluate:
    """[evaluate]: what is scored, and when."""

    # Scored each epoch. validation: the test set once, at the end; validation_only: never.
    split: Literal["test", "validation", "validation_only"]
    batch_size: int

    def __post_init__(self):
        positive(self, "evaluate", "batch_size")


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """[model.mlp], and what the other models share with it."""

    hidden: int  # C, the width of a token
    forms: Literal["library", "published"]  # of each attention; see tab/layers/published.py
    match: str  # whose size the others get, and by what (size_matching.py); "": as given
    tokens: int  # the Linear's outputs are split into this many tokens
    # replace: y = A(x). residual: y = x + γ·A(norm(x)) with γ = 0 at first.
    # pre_norm: a transformer block, see tab/models/transformer.py
    block: Literal["replace", "residual", "pre_norm"]
    # learned, sincos: a table added to the tokens; rope: q and k are rotated
    position: Literal["none", "learned", "rope", "sincos"]
    head_layers: int  # hidden layers between the attention and the logits
    # Of "pre_norm" alone:
    ffn_ratio: float = 0.0  # the width of the FFN behind the attention, times C; 0: no FFN
    layer_scale: float = 1.0  # γ, the gate of each branch, at first
    depth: int = 1  # blocks

    def grid(self, side: int) -> tuple[int, int] | None:
        """(rows, cols) if the tokens are the cells of a feature map, of images of `side` rows and
        columns; else None."""
        return None

    def places(self, side: int) -> tuple[int, int] | None:
        """The grid that fixed positions are of, also where other tokens stand in front of it."""
        return self.grid(side)

    def count(self, side: int) -> int:
        """N, the tokens."""
        grid = self.grid(side)
        return grid[0] * grid[1] if grid else self.tokens

    def __post_init__(self):
        positive(self, "model", "hidden", "depth", *(["tokens"] if self.tokens != "grid" else []))
        between(self, "model", "head_layers", 0, 16)
        between(self, "model", "ffn_ratio", 0, 64)
        between(self, "model", "layer_scale", 0, 10)
        default = {f.name: f.default for f in dataclasses.fields(Mlp)}
        for name in ("ffn_ratio", "layer_scale", "depth"):
            if self.block != "pre_norm" and getattr(self, name) != default[name]:
                raise ValueError(
                    f"model.{name} = {getattr(self, name)} is an option of transformer blocks, but "
                    f'block = "{self.block}"; give block = "pre_norm", or leave it at '
                    f"{default[name]}"
                )


@dataclass(frozen=True, kw_only=True)
class Cnn(Mlp):
    """[model.cnn]."""

    tokens: int | Literal["grid"]  # "grid": one token a cell of the last feature map
    stem: Literal["pool", "stride"]  # conv-BN-ReLU-maxpool twice, or two convolutions of stride 2
    channels: int  # of the first convolution; the second has C on the grid, else twice as many
    convolutions: int = 2  # those after the second keep the size of the last feature map

    def __post_init__(self):
        super().__post_init__()
        positive(self, "model", "channels")
        between(self, "model", "convolutions", 2, 16)

    def grid(self, side: int) -> tuple[int, int] | None:
        return (side // 4, side // 4) if self.tokens == "grid" else None


@dataclass(frozen=True, kw_only=True)
class Resnet9(Mlp):
    """[model.resnet9]."""

    tokens: Literal["grid"]
    channels: int  # of the first convolution; then 2×, 4×, and C
    cells: Literal[4, 8]  # rows and columns of the last feature map
    whiten: bool = False  # the first layer is fixed: it whitens the patches of training images
    logit_scale: float = 1.0  # what the logits are multiplied by

    def __post_init__(self):
        super().__post_init__()
        positive(self, "model", "channels", "logit_scale")

    def grid(self, side: int) -> tuple[int, int]:
        return (self.cells * side // IMAGE,) * 2


@dataclass(frozen=True, kw_only=True)
class Vit(Mlp):
    """[model.vit]."""

    tokens: Literal["grid"]
    patch: Literal[1, 2, 4, 8]  # rows and columns of pixels that are one token
    # What the head reads: the mean over the tokens, or one more token in front of them. With that,
    # the tokens are a line and not a grid.
    pool: Literal["mean", "class"]

    def grid(self, side: int) -> tuple[int, int] | None:
        return None if self.pool == "class" else self.places(side)

    def places(self, side: int) -> tuple[int, int]:
        return (side // self.patch,) * 2

    def count(self, side: int) -> int:
        return (side // self.patch) ** 2 + (self.pool == "class")


@dataclass(frozen=True, kw_only=True)
class Tokens(Mlp):
    """A model of sequences (tab/data/sequences.py): `tokens` is their length, and the head answers
    at each place."""


MODELS: dict[str, type[Mlp]] = {
    "mlp": Mlp,
    "cnn": Cnn,
    "resnet9": Resnet9,
    "vit": Vit,
    "tokens": Tokens,
}
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

    @property
    def tokens(self) -> int:
        """N, those that the attention sees."""
        return self.model_options.count(self.data.size)

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
    """The options of the model called so."""
    check_keys("model", [name], MODELS)
    return MODELS[name]


def options(kind: type, where: str, given: dict):
    """`kind(**given)` after checking names, types and completeness."""
    known, given = hints(kind), {**later_options(kind), **given}
    check_keys(where, given, known, complete=True)
    return kind(**{key: check_type(f"{where}.{key}", given[key], known[key]) for key in known})


def later_options(kind: type) -> dict[str, object]:
    """What recipes and results mean that are older than these options."""
    fields = dataclasses.fields(kind)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def as_known_now(config: dict) -> dict:
    """`config`, as a run's file has it, with the options that came later."""
    return RunConfig.from_dict(config).to_dict()


def flat(tree: dict, prefix: str = "") -> dict:
    """{"train.lr": …}: nested tables by dotted names."""
    found = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found
