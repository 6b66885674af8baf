"""Checks of names, types and ranges, whose errors name what was given and the nearest way out."""

from __future__ import annotations

import difflib
import functools
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

_UNIONS = (typing.Union, types.UnionType)  # int | Literal["grid"] is the first, int | str the other

_WORDS = {
    **{int: "an integer", float: "a number", str: "a string", bool: "true or false"},
    dict: "a table of keys",
}


@functools.cache
def hints(kind: Any) -> Mapping[str, Any]:
    """The annotations of a class or a function, NameError if one cannot be read. Where they are
    strings, Python compiles each anew whenever it is asked."""
    return types.MappingProxyType(typing.get_type_hints(kind))


def unknown(name: str, known: Iterable[str], choose: str, *, what: str = "") -> str:
    """The error about a name that nobody knows, with the nearest one, then `choose`. what: the
    kind of name, "op " for instance."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if not found:
        return f"unknown {what}{name!r}; {choose}"
    return f"unknown {what}{name!r}; did you mean {found[0]!r}? {choose[0].upper()}{choose[1:]}"


def check_keys(
    where: str, given: Iterable[str], known: Iterable[str], *, complete: bool = False
) -> None:
    """Unknown names raise a ValueError with the nearest known one; so do missing ones."""
    given, known = list(given), list(known)
    for key in given:
        if key not in known:
            takes = f"it takes: {', '.join(known)}"
            raise ValueError(f"{where}: {unknown(key, known, takes)}")
    if complete and (missing := [key for key in known if key not in given]):
        raise ValueError(f'{where}: {", ".join(missing)} missing; give it, or a base = "fair"')


def check_type(where: str, value: object, hint: object) -> Any:
    """`value` if it is a `hint` (an int passes for a float), else a ValueError. An int has 64 bits,
    as in TOML and in torch."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where} = {value!r}: give a number of 64 bits")
    for kind in choices:
        if typing.get_origin(kind) is Literal:
            if any(type(value) is type(one) and value == one for one in typing.get_args(kind)):
                return value
        elif kind is float and type(value) in (int, float):
            return float(value)
        elif type(value) is kind:
            return value
    wanted = " or ".join(
        ", ".join(map(repr, typing.get_args(kind)))
        if typing.get_origin(kind) is Literal
        else _WORDS.get(kind, kind.__name__)
        for kind in choices
    )
    raise ValueError(f"{where} = {value!r}: give {wanted}")


def check_option(where: str, value: object, hint: object, default: object) -> None:
    """A ValueError if `value`, from a file, is no option of a layer with this annotation and
    default: it has that type, as far as files have it, and a number is finite."""
    files = (bool, int, float, str)
    choices = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
    kinds = [k for k in choices if k in files or typing.get_origin(k) is Literal]
    if not kinds and type(default) in files:  # without an annotation
        kinds = [type(default)]
    if kinds:
        value = check_type(where, value, functools.reduce(operator.or_, kinds))
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} = {value!r}: give a finite number")


def positive(section: object, where: str, *keys: str) -> None:
    """A ValueError unless each of these fields is above 0 and finite."""
    for key in keys:
        if not 0 < getattr(section, key) < math.inf:
            given = getattr(section, key)
            raise ValueError(f"{where}.{key} = {given!r}: must be above 0 and finite")


def between(section: object, where: str, key: str, low: float, high: float) -> None:
    """A ValueError unless the field lies from low to high."""
    if not low <= getattr(section, key) <= high:
        raise ValueError(f"{where}.{key} = {getattr(section, key)!r}: must be from {low} to {high}")
