"""Arguments that are no tensors, checked by their annotations, where a function, a layer or a cache
is called by hand and not in a loop: the operators check theirs themselves (_options.py)."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch

NUMBERS: dict[Any, type] = {int: numbers.Integral, float: numbers.Real}
SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
Called = TypeVar("Called", bound=Callable)


def typed(function: Called, rule: Callable[..., None] | None = None) -> Called:
    """`function`, with a TypeError for the first argument that is not what its annotation says: a
    number, a text, True or False, None, a list of these, or an object of a class. What an
    annotation says beside these is left alone. Numbers of NumPy become Python's, and a whole one
    of more than 64 bits is a ValueError.

    rule: called with the function's name and the arguments by their names, once they are checked.
    """
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        try:
            return typing.get_type_hints(function)
        except NameError:  # names that only a type checker imports
            return {}

    @functools.wraps(function)
    def checked(*args, **options):
        if torch.compiler.is_compiling():  # signatures are not traced
            return function(*args, **options)
        try:
            bound = signature.bind(*args, **options)
        except TypeError:
            return function(*args, **options)  # which says what is missing, or too much
        what = type(args[0]) if function.__name__ == "__init__" else function
        for name, value in bound.arguments.items():
            if name in hints() and signature.parameters[name].kind not in SEVERAL:
                bound.arguments[name] = _as(hints()[name], value, what.__qualname__, name)
        if rule is not None:
            rule(what.__qualname__, **bound.arguments)
        return function(*bound.args, **bound.kwargs)

    return typing.cast(Called, checked)


def _as(hint: object, value: object, what: str, name: str) -> object:
    choices = _choices(hint)
    for choice in choices:
        if _fits(choice, value):
            value = _plain(value)
            if type(value) is int and not -(2**63) <= value < 2**63:
                raise ValueError(f"{what}(): argument {name!r} = {value}: give a number of 64 bits")
            return value
    wanted = " or ".join(dict.fromkeys(map(_word, choices)))
    kind, given = type(value).__name__, f"{value!r:.60}"
    raise TypeError(f"{what}(): argument {name!r} must be {wanted}, not {kind}; got {given}")


def _choices(hint: object) -> list[Any]:
    """The members of a union, unions within it included."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [choice for part in typing.get_args(hint) for choice in _choices(part)]
    return [hint]


def _fits(hint: Any, value: object) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:  # which of them is a question of its own, which the function answers
        return type(value) in {type(arg) for arg in args}
    if origin in (tuple, list, collections.abc.Sequence, collections.abc.Iterable):
        return _fits_all(origin, args, value)
    if hint in NUMBERS:
        if hint is float and isinstance(value, torch.Tensor):
            return True  # who takes the number says what a learned one is to be multiplied with
        return isinstance(value, NUMBERS[hint]) and not isinstance(value, bool)
    kind = origin or hint
    if inspect.isclass(kind) and origin is None and getattr(kind, "_is_protocol", False):
        return all(hasattr(value, each) for each in vars(kind) if not each.startswith("_"))
    return not inspect.isclass(kind) or isinstance(value, kind)


def _fits_all(origin: type, args: tuple, value: object) -> bool:
    """Of a pair, and of others that hold one kind; lists pass for tuples. What can be read only
    once is not looked into."""
    if isinstance(value, str):  # of one name its letters would be taken for names
        return False
    if not isinstance(value, (list, tuple)):
        return origin not in (list, tuple) and isinstance(value, origin)
    if origin is tuple and args[-1:] != (...,):
        return len(value) == len(args) and all(
            _fits(*pair) for pair in zip(args, value, strict=True)
        )
    kinds = _choices(args[0]) if args else []
    return not kinds or all(any(_fits(kind, one) for kind in kinds) for one in value)


def _plain(value: object) -> object:
    """A number of NumPy as Python's; also in a list or tuple."""
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)([_plain(one) for one in value])
    if isinstance(value, numbers.Real) and hasattr(value, "item"):
        return value.item()
    return value


def _word(hint: Any) -> str:
    """As an error says it."""
    if hint is types.NoneType:
        return "None"
    if typing.get_origin(hint) is Literal:
        return " or ".join(dict.fromkeys(type(arg).__name__ for arg in typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"({', '.join('…' if arg is ... else _word(arg) for arg in typing.get_args(hint))})"
    name = getattr(hint, "__name__", str(hint))
    args = [] if name == "Mapping" else typing.get_args(hint)[:1]
    return name + "".join(f" of {' or '.join(map(_word, _choices(arg)))}" for arg in args)
