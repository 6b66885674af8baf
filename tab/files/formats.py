"""JSON, TOML and lines of JSON, read one way and written one way.

Whatever is wrong with a file ends in one line: its name, what is wrong, and the way out. A file
states the format that it is written in, so that what a later TAB has written is not misread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import operator
import pickle
import textwrap
import tomllib
import types
import typing
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors
import tomli_w

from ..checks import check_keys, check_type, hints
from . import Corrupt, shown, write

FORMAT = 1  # a file without it is of a time before there was another
FAULTS = (  # what reading damaged content raises, here or in a library
    *(ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError),
    *(zipfile.BadZipFile, pickle.UnpicklingError, safetensors.SafetensorError),
)


@contextlib.contextmanager
def reading(path: Path, way_out: str) -> Iterator[None]:
    """What goes wrong within is the fault of the file `path`: Corrupt, or an OSError that names it.

    way_out: what to do then, such as "remove it and resume".
    """
    try:
        yield
    except Corrupt:
        raise
    except OSError as error:
        text = f"{error.strerror or error} (mend that, or {way_out})"
        raise OSError(error.errno, text, str(path)) from error
    except FAULTS as error:
        what = textwrap.shorten(str(error) or type(error).__name__, 200)
        raise Corrupt(f"{path} is damaged or foreign: {what}; {way_out}") from None


def read_json(path: Path, kind: type, way_out: str) -> dict:
    """The object in a JSON file, which has what `kind`, a TypedDict, asks for."""
    with reading(path, way_out):
        found = check("it", _parsed("JSON", json.loads, path.read_bytes()), dict)
        _known_format(path, found, way_out)
        return check("it", found, kind)


def read_toml(path: Path, kind: type, way_out: str) -> dict:
    """The same of a TOML file."""
    with reading(path, way_out):
        found = _parsed("TOML", tomllib.loads, path.read_bytes())
        _known_format(path, found, way_out)
        return check("it", found, kind)


def read_lines(path: Path, way_out: str) -> list[dict]:
    """A JSON object a line. Half a line at the end, where a copy broke off, is left out."""
    with reading(path, way_out):
        *lines, torn = path.read_bytes().split(b"\n")
        found = [_parsed("lines of JSON", json.loads, line) for line in lines]
        with contextlib.suppress(ValueError):
            found.append(_parsed("JSON", json.loads, torn))
        return check("it", found, list[dict])


def write_json(path: Path, content: dict) -> None:
    """An object, with the format it is written in."""
    text = json.dumps({"format": FORMAT, **content}, indent=1, ensure_ascii=False) + "\n"
    # Bytes of a path that are no text are lone surrogates, and their escape here is JSON's.
    write(path, text.encode("utf-8", "backslashreplace"))


def write_toml(path: Path, content: dict) -> None:
    """Tables, with the format they are written in."""
    write(path, toml({"format": FORMAT, **content}).encode())


def toml(content: dict) -> str:
    """TOML that reads back as the same; a ValueError names what no TOML file can hold."""
    try:
        text = tomli_w.dumps(content)
        text.encode()
        return text
    except UnicodeEncodeError as error:
        at = error.object.count("\n", 0, error.start)
        line = error.object.split("\n")[at].strip().rstrip(",")
        raise ValueError(
            f"{shown(line)}: this is no Unicode text, and cannot be kept in a file; rename it"
        ) from None
    except TypeError as error:
        raise ValueError(f"cannot be kept as TOML: {error}") from None


# --- checks ---------------------------------------------------------------------------------------


def check(where: str, value: object, kind: object):
    """`value`, a ValueError if it is no `kind`: a TypedDict, which may hold more than it names; a
    dataclass, which may not; list[…]; dict[str, …]; or what `check_type` knows."""
    if types.NoneType in typing.get_args(kind):  # "… | None"
        if value is None:
            return None
        kind = functools.reduce(operator.or_, set(typing.get_args(kind)) - {types.NoneType})
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind) or dataclasses.is_dataclass(kind):
        check_type(where, value, dict)
        known = hints(kind)
        if dataclasses.is_dataclass(kind):
            check_keys(where, value, known)
        for key in _required(kind):
            if key not in value:
                raise ValueError(f"{where} has no {key}")
        for key in known.keys() & value.keys():
            check(f"{where}: {key}", value[key], known[key])
    elif origin in (dict, list):
        check_type(where, value, origin)
        for item in value.values() if origin is dict else value:
            check(where, item, inner[-1])
    else:
        check_type(where, value, kind)
    return value


@functools.cache
def _required(kind: type) -> list[str]:
    if typing.is_typeddict(kind):
        # Where annotations are strings, __required_keys__ holds what is NotRequired too.
        known = typing.get_type_hints(kind, include_extras=True)
        optional = {k for k, hint in known.items() if typing.get_origin(hint) is typing.NotRequired}
        return sorted(kind.__required_keys__ - optional)
    none = dataclasses.MISSING
    fields = dataclasses.fields(kind)
    return [f.name for f in fields if f.default is none and f.default_factory is none]


def _known_format(path: Path, found: dict, way_out: str) -> None:
    number = check_type("format", found.pop("format", FORMAT), int)
    if number > FORMAT:
        raise Corrupt(
            f"{path} was written by a later TAB (format {number}; this one reads {FORMAT}): "
            f"update TAB, or {way_out}"
        )


def _parsed(what: str, parse: Callable[[str], object], data: bytes):
    try:
        return parse(data.decode("utf-8-sig"))  # an editor may have put a mark at its beginning
    except ValueError as error:
        raise ValueError(f"not {what}: {error}") from None
