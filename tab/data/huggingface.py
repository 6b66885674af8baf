"""Data sets of Hugging Face's `datasets`, from the Hub or a folder: hf:NAME?key=value&…

    hf:uoft-cs/cifar100?label=fine_label          a repository of the Hub
    hf:pictures/                                  a folder, as of `save_to_disk` or of pictures

Keys are image and label (columns), train and test (splits), config and revision. What is not given
is found where there is one choice, and is else an error that names the choices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import numpy as np

from ..checks import check_keys
from .decode import Progress, decode_all, resized_note, shared_note
from .held_out import Pair, check_share, draw_test
from .pictures import TESTS, TRAIN
from .tree import shown, stamp

PREFIX = "hf:"
KEYS = ("image", "label", "train", "test", "config", "revision")


@dataclass(frozen=True)
class Source:
    """What a spec names; "" where it says nothing."""

    name: str
    image: str = ""
    label: str = ""
    train: str = ""
    test: str = ""
    config: str = ""
    revision: str = ""

    @classmethod
    def of(cls, spec: str) -> Source:
        """A ValueError names what is wrong with the spec."""
        name, _, query = spec.removeprefix(PREFIX).partition("?")
        if not name:
            raise ValueError(
                f"{spec!r} names no data set: give hf:NAME, such as hf:uoft-cs/cifar10"
            )
        given = parse_qsl(query, keep_blank_values=True)
        check_keys(spec, [key for key, _ in given], KEYS)
        if len(dict(given)) != len(given) or "" in dict(given).values():
            raise ValueError(f"{spec!r}: give each key once, as hf:NAME?key=value&key=value")
        return cls(name, **dict(given))

    @property
    def spec(self) -> str:
        """The spec, with a folder by its full path, so that work can resume from anywhere."""
        keys = [(key, getattr(self, key)) for key in KEYS if getattr(self, key)]
        query = "?" + urlencode(keys, safe="/:[]%") if keys else ""
        return f"{PREFIX}{self.folder or self.name}{query}"

    @property
    def folder(self) -> Path | None:
        """The folder on this machine, if it is one."""
        path = Path(self.name).expanduser()
        return path.resolve() if path.is_dir() else None

    def key(self) -> str:
        """Another string as soon as a file of the folder changes; of the Hub the spec, as what was
        fetched once stays as it was."""
        digest = hashlib.sha256(self.spec.encode())
        if self.folder:
            for path in sorted(self.folder.rglob("*")):
                if path.is_file():
                    digest.update(f"{path}\0{stamp(path)}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def read(
    source: Source, side: int, fit: str, progress: Progress | None, share: float
) -> tuple[tuple[str, ...], Pair, Pair, str]:
    """(classes, train, test, note). ValueError, OSError or ImportError name the way out. share:
    data.test_share."""
    whole = _load(source)
    train_name = _one(source, "train", source.train, list(whole), [TRAIN])
    names, test_name = [train_name], ""
    if source.test or set(TESTS) & set(whole):
        names.append(test_name := _one(source, "test", source.test, list(whole), TESTS))
    choose = f", or name one of {_listed(list(whole))} as hf:NAME?test=…"
    check_share(share, bool(test_name), source.spec, choose)
    image, label = _columns(source, whole[train_name])
    classes, label_of = _classes(source, whole[train_name], label)
    pairs, total, drawn = [], 0, ""
    for name in names:
        labels = _labels(source, whole[name], name, label, label_of)
        images, resized = _images(source, whole[name], name, image, side, fit, progress)
        pairs.append((images, labels))
        total += resized
    if not test_name:
        *pairs, drawn = draw_test(*pairs[0], share, source.spec)
    train, test = pairs
    note = f"{shown(source.name)}, as datasets has it"
    note += f" (config {source.config})" if source.config else ""
    note += f" (revision {source.revision})" if source.revision else ""
    note += f": {len(train[1]):,} train, {len(test[1]):,} test{resized_note(total, side, fit)}"
    if test_name not in ("test", ""):
        note += f"; the split {test_name} is the test set"
    return classes, train, test, note + drawn + shared_note(train[0], test[0])


def _load(source: Source) -> dict[str, Any]:
    """The splits by name."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"--data {source.spec} needs what is not installed ({error}): "
            'pip install "transformer-attention-bench[hf]"'
        ) from error
    if source.folder is None and source.name.startswith(("/", ".", "~")):
        raise ValueError(f"{PREFIX}{source.name}: there is no such folder")
    try:
        if source.folder and (source.folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(source.folder))
        name = str(source.folder or source.name)
        found = datasets.load_dataset(name, source.config or None, revision=source.revision or None)
    except (ValueError, OSError) as error:  # of the Hub's own kinds, each is one of these
        text = " ".join(str(error).split())
        kind = OSError if isinstance(error, OSError) else ValueError  # its own may want more
        raise kind(f"{source.spec} cannot be read: {text}") from error
    return found


def _one(
    source: Source, key: str, given: str, there: Sequence[str], usual: Sequence[str], why: str = ""
) -> str:
    """The one of `there` that is given, or else usual; an error names the choices."""
    if given and given not in there:
        raise ValueError(f"{source.spec}: there is no {given!r}; choose from {_listed(there)}")
    for name in [given] if given else usual:
        if name in there:
            return name
    raise ValueError(
        f"{source.spec}: which is the {key}{why}? There are {_listed(there)}; say it as "
        f"hf:NAME?{key}=…"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names)) or "none"


def _columns(source: Source, split: Any) -> tuple[str, str]:
    """(the column of the images, that of the labels)."""
    import datasets

    kinds = split.features
    images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    image = _one(source, "image", source.image, images, images[:1] if len(images) == 1 else [])
    labels = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    others = [name for name in kinds if name not in images]
    usual = labels if len(labels) == 1 else []
    return image, _one(source, "label", source.label, others, usual)


def _classes(source: Source, train: Any, label: str) -> tuple[tuple[str, ...], Callable]:
    """(the classes, what makes a label's number of its value)."""
    import datasets

    kind = train.features[label]
    if isinstance(kind, datasets.ClassLabel):
        return tuple(map(shown, kind.names)), int
    found = _values(train, label)
    try:
        values = sorted(set(found) - {None})
    except TypeError:  # lists, for instance
        raise ValueError(
            f"{source.spec}: {label} holds no classes but values such as {found[0]!r:.40}; name "
            "another column, as hf:NAME?label=…"
        ) from None
    numbers = {value: number for number, value in enumerate(values)}
    return tuple(shown(value) for value in values), lambda value: numbers.get(value, -1)


def _values(split: Any, column: str) -> list:
    return split.select_columns([column]).with_format(None)[:][column]


def _labels(source: Source, split: Any, name: str, label: str, label_of: Callable) -> np.ndarray:
    labels = [-1 if x is None else label_of(x) for x in _values(split, label)]
    if hidden := sum(number < 0 for number in labels):
        raise ValueError(
            f"{source.spec}: {hidden:,} of {len(labels):,} images of the split {name} have no "
            f"label in {label} that train has; name another split, as hf:NAME?test=…"
        )
    return np.asarray(labels, np.int64)


def _images(
    source: Source,
    split: Any,
    name: str,
    column: str,
    side: int,
    fit: str,
    progress: Progress | None,
) -> tuple[np.ndarray, int]:
    import datasets

    raw = split.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    raw = raw.with_format(None)

    def fetch(start: int, stop: int) -> list[bytes]:
        return [_bytes(cell) for cell in raw[start:stop][column]]

    def at(i: int) -> str:
        return f"{source.spec}: image {i} of {name}"

    return decode_all(len(raw), fetch, at, side, fit, progress)


def _bytes(cell: dict | None) -> bytes:
    """Of a picture; nothing, which is none, where there is none."""
    if cell is None:
        return b""
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
