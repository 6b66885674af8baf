"""One registry: a mechanism's name -> its layer.

A layer of your own joins by the decorator, or from an installed package by an entry point:

    @register_attention("mine")                       [project.entry-points."tab.attentions"]
    class Mine(tab.layers.Attention): ...             mine = "my_package.layers:Mine"

and is then trained, compared and reported like the built-in twelve.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points

from ..checks import hints, unknown
from ..ops._options import boolean
from ..ops._typed import typed
from ._base import Attention

_layers: dict[str, type[Attention]] = {}
_published: dict[str, type[Attention]] = {}  # in place of those, where a recipe asks for it


COMMON = {"self", "dim", "seq_len", "grid"}  # what each layer takes
GROUPS = ("all", "ladder")  # in a list of names: all attentions, all controls


def register_attention(
    name: str, *, published: bool = False
) -> Callable[[type[Attention]], type[Attention]]:
    """Class decorator: makes a layer available under `name` (CLI, recipes, reports).

    published: as what the published study ran under that name (tab/layers/published.py).
    ValueError: a name that cannot be part of a directory's, or an item of a list with commas.
    TypeError: no class of `tab.layers.Attention`, or one that cannot be built as the others are.

    >>> @tab.layers.register_attention("mean")
    ... class Mean(tab.layers.Attention):
    ...     def __init__(self, dim, *, seq_len, grid=None):
    ...         super().__init__()
    ...     def compute(self, x, key_mask):
    ...         return x.mean(1, keepdim=True).expand_as(x)
    >>> tab.layers.build_attention("mean", 32, seq_len=64)(x).shape
    torch.Size([2, 64, 32])
    """
    if not isinstance(name, str):
        raise TypeError(
            f'register_attention wants a name, got {name!r}: write @register_attention("NAME")'
        )
    layers = _published if boolean("register_attention", "published", published) else _layers
    if (
        not name.isprintable()
        or name != name.strip(" .-")
        or set(name) & set(r"/\,")
        or name in ("", *GROUPS)
    ):
        raise ValueError(
            f"register_attention({name!r}): directories and lists are named by it, so it may not "
            "be empty, `all` or `ladder`, hold / \\ , or control characters, nor begin or end with "
            "a space, a dot or a dash"
        )

    def register(layer: type[Attention]) -> type[Attention]:
        if not (inspect.isclass(layer) and issubclass(layer, Attention)):
            raise TypeError(
                f"register_attention({name!r}) wants a tab.layers.Attention, got {layer!r}"
            )
        _check_options(name, layer)
        was = layers.get(name, layer)
        # The same class once more: a cell of a notebook that ran again, a plugin that was mended.
        if (was.__module__, was.__qualname__) != (layer.__module__, layer.__qualname__):
            raise ValueError(
                f"the attention {name!r} is already {was.__qualname__}; give yours another name"
            )
        layers[name] = layer
        return layer

    return register


def _check_options(name: str, layer: type[Attention]) -> None:
    """A TypeError unless it can be built from (dim, *, seq_len, grid) alone."""
    takes = inspect.signature(layer.__init__).parameters.values()
    if any(p.kind == p.VAR_KEYWORD for p in takes):
        return
    names = {p.name for p in takes}
    wrong = [f"takes no {each}" for each in ("seq_len", "grid") if each not in names]
    own = [p for p in takes if p.name not in COMMON]
    wrong += [f"has no default for {p.name}" for p in own if p.default is p.empty]
    if wrong:
        raise TypeError(
            f"register_attention({name!r}): __init__ of {layer.__name__} {' and '.join(wrong)}; a "
            "layer takes (self, dim, *, seq_len, grid=None, …), and its own options have defaults"
        )


def attention_names() -> list[str]:
    """What "all" stands for: the built-in twelve, `none` among them, in the order of the
    documentation, then attentions from elsewhere.

    >>> tab.layers.attention_names()[:4]
    ['none', 'self', 'multi_head', 'linear']
    """
    known = [name for name, layer in _layers.items() if layer.is_attention or name == "none"]
    return [*known, *sorted(set(_entry_points()) - set(_layers))]


def control_names() -> list[str]:
    """What "ladder" stands for: the layers that are no attention, `none` first.

    >>> tab.layers.control_names()[:4]
    ['none', 'none_again', 'ffn', 'uniform']
    """
    return [name for name, layer in _layers.items() if not layer.is_attention]


def layer_names() -> list[str]:
    """Every registered name: `attention_names`, then the other controls.

    >>> {"none", "performer", "uniform"} <= {*tab.layers.layer_names()}
    True
    """
    return list(dict.fromkeys([*attention_names(), *control_names()]))


# Of an unknown one.
OWN = '--plugin FILE loads one of your own, with @register_attention("NAME") above its class'


def get_attention(name: str, *, published: bool = False) -> type[Attention]:
    """The layer class called `name`, or a ValueError with the nearest name.

    published: the form that the published study ran, where it was another.

    >>> tab.layers.get_attention("performer").__name__
    'PerformerAttention'
    >>> tab.layers.get_attention("perfomer")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: unknown attention 'perfomer'; did you mean 'performer'? Choose one of: none, ...
    """
    if name not in _layers:
        if name not in (found := _entry_points()):
            names = layer_names()
            choose = f"choose one of: {', '.join(names)}; {OWN}"
            raise ValueError(unknown(name, names, choose, what="attention "))
        register_attention(name)(found[name].load())
    published = boolean("get_attention", "published", published)
    return _published.get(name, _layers[name]) if published else _layers[name]


def known_layer(name: str) -> type[Attention] | None:
    """The layer class called `name`; None where it is not installed, as in a report on runs of
    another machine, or its package does not load, which a warning says.

    >>> tab.layers.known_layer("linear").title, tab.layers.known_layer("of another machine")
    ('Linear', None)
    """
    if name not in _layers and name not in _entry_points():
        return None
    try:
        return get_attention(name)
    except Exception as error:  # a package may fail in any way
        warnings.warn(
            f"the attention {name!r} does not load, so reports know it by this name alone: {error}",
            stacklevel=2,
        )
        return None


def claimed_colours() -> set[int]:
    """Of all layers that are loaded.

    >>> tab.layers.get_attention("linear").colour in tab.layers.claimed_colours()
    True
    """
    return {layer.colour for layer in _layers.values() if layer.colour is not None}


def attention_options(name: str, *, published: bool = False) -> dict[str, object]:
    """The layer's own options with their defaults, read off its signature.

    >>> tab.layers.attention_options("local")["window_size"]
    16
    """
    layer = get_attention(name, published=published)
    parameters = inspect.signature(layer.__init__).parameters.values()
    return {
        p.name: p.default for p in parameters if p.name not in COMMON and p.kind != p.VAR_KEYWORD
    }


def option_types(name: str) -> dict[str, object]:
    """The annotations of these options, as far as they can be read.

    >>> tab.layers.option_types("local")["window_size"]
    <class 'int'>
    """
    try:
        return dict(hints(get_attention(name).__init__))
    except NameError:  # names that only a type checker imports
        return {}


@typed
def build_attention(
    name: str,
    dim: int,
    *,
    seq_len: int,
    grid: tuple[int, int] | None = None,
    published: bool = False,
    **options,
) -> Attention:
    """The layer `name` for tokens (B, N, dim), N ≤ seq_len, with its own options.

    grid (rows, cols): the tokens are the cells of an image, rows · cols = seq_len.

    >>> layer = tab.layers.build_attention("local", 32, seq_len=64, grid=(8, 8), window_size=5)
    >>> layer(x).shape
    torch.Size([2, 64, 32])
    """
    known = attention_options(name, published=published)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"{name} has no option {', '.join(unknown)}; it takes {', '.join(known) or 'none'}"
        )
    layer = get_attention(name, published=published)
    return layer(dim, seq_len=seq_len, grid=grid, **options)


@functools.cache
def _entry_points() -> dict:
    """Of the packages that are there at the first call. Reading the metadata of all takes 7 ms, and
    a recipe asks for names a hundred times."""
    return {point.name: point for point in entry_points(group="tab.attentions")}
