"""Pictures from a folder or a tar archive, train/<class>/* and test/<class>/*, as uint8 arrays.

An archive is read in memory and never unpacked to disk, so nothing in it can reach outside.
Any JPEG or PNG is taken: turned as its EXIF says, transparency laid over white, grey, palette, CMYK
and 16-bit grey converted to RGB, and stretched to 32×32 whatever its proportions.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

SPLITS = ("train", "test")
BLOCK = 250  # pictures decoded by a thread between two reports of progress
LAYOUT = "wanted are pictures train/<class>/* and test/<class>/*"
BROKEN_TAR = (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError)


def listing(path: Path) -> tuple[str, dict[str, list[str]]]:
    """(key, {"train/cat": [file names]}) of a folder; the key changes when any file does."""
    digest, found = hashlib.sha256(), {}
    for split in SPLITS:
        if not (path / split).is_dir():
            here = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            raise ValueError(f"{path} has no folder {split!r}, it holds {here}; {LAYOUT}")
        for folder in _visible(path / split):
            if not folder.is_dir():
                raise ValueError(f"{folder.path} is no class folder; remove it: {LAYOUT}")
            name = f"{split}/{folder.name}"
            found[name] = []
            for entry in _visible(folder.path):
                if entry.is_dir():
                    raise ValueError(f"{entry.path} is a folder within a class; {LAYOUT}")
                stat = entry.stat()
                digest.update(f"{name}/{entry.name}\0{stat.st_size} {stat.st_mtime_ns}\n".encode())
                found[name].append(entry.name)
    return digest.hexdigest(), found


def archive_key(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def read_archive(path: Path) -> tuple[dict[str, list[str]], Callable[[str], bytes]]:
    """({"train/cat": [file names]}, name -> bytes) of a tar archive, plain or compressed."""
    found: dict[str, list[str]] = {}
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|*") as archive:  # a stream: each byte is unpacked once
            for member in archive:
                parts = PurePosixPath(member.name).parts
                if member.isdir() and len(parts) > 1 and parts[-2] in SPLITS:
                    found.setdefault("/".join(parts[-2:]), [])
                if not member.isfile() or parts[-1].startswith("."):
                    continue
                if len(parts) > 3 and any(split in parts[:-3] for split in SPLITS):
                    raise ValueError(f"{path}: {member.name} lies too deep; {LAYOUT}")
                if len(parts) > 2 and parts[-3] in SPLITS:
                    contents["/".join(parts[-3:])] = archive.extractfile(member).read()
                    found.setdefault("/".join(parts[-3:-1]), []).append(parts[-1])
    except BROKEN_TAR as error:
        raise ValueError(
            f"{path} is no whole tar archive ({error}); copy or fetch it again"
        ) from error
    return found, contents.__getitem__


def class_names(path: Path, found: dict[str, list[str]], order: tuple[str, ...]) -> tuple[str, ...]:
    """The classes: in the given order if they are just these, else sorted."""
    train, test = (
        {name.split("/")[1] for name in found if name.startswith(f"{split}/")} for split in SPLITS
    )
    for here, there, names in (("train", "test", train - test), ("test", "train", test - train)):
        if names:
            raise ValueError(
                f"{path}: {here} has the classes {', '.join(sorted(names))}, {there} has not; "
                "both need the same class folders"
            )
    if len(train) < 2:
        raise ValueError(f"{path} has {len(train)} class(es), needed are 2 or more; {LAYOUT}")
    for name, files in found.items():
        if not files:
            raise ValueError(f"{path / name} is empty; add pictures, or remove the class from both")
    return order if train == set(order) else tuple(sorted(train))


def decode_all(
    path: Path,
    names: list[str],
    fetch: Callable[[str], bytes],
    side: int,
    progress: Callable[[int, int, str], None] | None,
) -> tuple[np.ndarray, int]:
    """(images uint8 (len(names), side, side, 3), how many had another size)."""
    images = np.empty((len(names), side, side, 3), np.uint8)

    def block(start: int) -> int:
        resized = 0
        for i, name in enumerate(names[start : start + BLOCK], start):
            try:
                images[i], other = _decode(fetch(name), side)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise ValueError(
                    f"{path / name} is no whole JPEG or PNG ({error}); replace or remove it"
                ) from error
            resized += other
        return resized

    total = 0
    starts = range(0, len(names), BLOCK)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start, resized in zip(starts, pool.map(block, starts), strict=True):
            total += resized
            if progress:
                progress(min(start + BLOCK, len(names)), len(names), "decoding pictures")
    return images, total


def _decode(data: bytes, side: int) -> tuple[np.ndarray, bool]:
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
            image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        other = image.size != (side, side)
        if other:
            image = image.resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(image), other


def _visible(folder: str | Path) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
