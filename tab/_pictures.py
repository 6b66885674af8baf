"""Pictures from a folder or a tar archive, train/<class>/* and test/<class>/*, as uint8 arrays.

An archive is read in memory and never unpacked to disk, so nothing in it can reach outside.
Any JPEG or PNG is taken: turned as its EXIF says, transparency laid over white, grey, palette, CMYK
and 16-bit grey converted to RGB, and stretched to a square whatever its proportions.
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
Pair = tuple[np.ndarray, np.ndarray]  # images uint8 (N, side, side, 3), labels int64 (N,)
Progress = Callable[[int, int, str], None]  # (done, total, what)


def key(path: Path) -> str:
    """Another string as soon as a file comes, goes, or changes its size or time."""
    if path.is_file():
        stat = path.stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"
    digest = hashlib.sha256()
    for folder, entries in _scan(path).items():
        for entry in entries:
            stat = entry.stat()
            digest.update(f"{folder}/{entry.name}\0{stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read(
    path: Path, order: tuple[str, ...], side: int, progress: Progress | None
) -> tuple[tuple[str, ...], Pair, Pair, str]:
    """(classes, train, test, note); classes in `order` if they are just those, else sorted."""
    if path.is_dir():
        found = {folder: [entry.name for entry in part] for folder, part in _scan(path).items()}

        def fetch(name: str) -> bytes:
            return (path / name).read_bytes()
    else:
        found, fetch = _read_archive(path)
    classes = _classes(path, found, order)
    names, labels = [], []
    for split in SPLITS:
        for label, name in enumerate(classes):
            files = sorted(found[f"{split}/{name}"])
            names += [f"{split}/{name}/{file}" for file in files]
            labels += [label] * len(files)
    images, resized = _decode_all(path, names, fetch, side, progress)  # (train + test, side, side)
    n = sum(name.startswith("train/") for name in names)
    note = f"pictures from {path.name}: {n:,} train, {len(names) - n:,} test"
    if resized:
        note += f", {resized:,} of them resized to {side}×{side}"
    if any(name.lower().endswith((".jpg", ".jpeg")) for name in names):
        note += "; lossy JPEG: accuracy can differ a little from that on the original pixels"
    both = np.asarray(labels, np.int64)
    return classes, (images[:n], both[:n]), (images[n:], both[n:]), note


def _scan(path: Path) -> dict[str, list[os.DirEntry]]:
    """{"train/cat": its files} of a folder."""
    found = {}
    for split in SPLITS:
        if not (path / split).is_dir():
            here = ", ".join(entry.name for entry in _visible(path)[:8]) or "nothing"
            raise ValueError(f"{path} has no folder {split!r}, it holds {here}; {LAYOUT}")
        for folder in _visible(path / split):
            if not folder.is_dir():
                raise ValueError(f"{folder.path} is no class folder; remove it: {LAYOUT}")
            found[f"{split}/{folder.name}"] = _visible(folder.path)
            for entry in found[f"{split}/{folder.name}"]:
                if entry.is_dir():
                    raise ValueError(f"{entry.path} is a folder within a class; {LAYOUT}")
    return found


def _visible(folder: str | Path) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def _read_archive(path: Path) -> tuple[dict[str, list[str]], Callable[[str], bytes]]:
    """({"train/cat": file names}, name -> bytes); folders above train and test do not matter."""
    found: dict[str, list[str]] = {}
    contents: dict[str, bytes] = {}
    end = 0
    try:
        with tarfile.open(path) as archive:  # read in order: each byte is unpacked once
            for member in archive:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                parts = PurePosixPath(member.name).parts
                if member.isdir() and len(parts) > 1 and parts[-2] in SPLITS:
                    found.setdefault("/".join(parts[-2:]), [])
                if not member.isfile() or parts[-1].startswith("."):
                    continue
                if any(part in SPLITS for part in parts[:-3]):
                    raise ValueError(f"{path}: {member.name} lies too deep; {LAYOUT}")
                if len(parts) > 2 and parts[-3] in SPLITS:
                    contents["/".join(parts[-3:])] = archive.extractfile(member).read()
                    found.setdefault("/".join(parts[-3:-1]), []).append(parts[-1])
            # tarfile takes an archive cut between two members for whole. Wanted are the empty block
            # after the last one, and the checksum at the very end of a compressed file.
            if archive.fileobj.tell() < end + tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end is missing")
            while archive.fileobj.read(2**20):
                pass
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise ValueError(
            f"{path} is no whole tar archive ({error}); copy or fetch it again"
        ) from error
    return found, contents.__getitem__


def _classes(path: Path, found: dict[str, list[str]], order: tuple[str, ...]) -> tuple[str, ...]:
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
        raise ValueError(f"{path} has {len(train)} classes, but 2 or more are needed; {LAYOUT}")
    for name, files in found.items():
        if not files:
            raise ValueError(f"{path / name} is empty; add pictures, or remove the class from both")
    return order if train == set(order) else tuple(sorted(train))


def _decode_all(
    path: Path,
    names: list[str],
    fetch: Callable[[str], bytes],
    side: int,
    progress: Progress | None,
) -> tuple[np.ndarray, int]:
    """(images uint8 (len(names), side, side, 3), how many had another size)."""
    images = np.empty((len(names), side, side, 3), np.uint8)

    def block(start: int) -> int:
        resized = 0
        for i, name in enumerate(names[start : start + BLOCK], start):
            try:
                images[i], other = _decode(fetch(name), side)
            # Pillow raises SyntaxError for a broken PNG.
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise ValueError(
                    f"{path / name} is no whole JPEG or PNG ({error}); replace or remove it"
                ) from error
            resized += other
        return resized

    total, starts = 0, range(0, len(names), BLOCK)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start, resized in zip(starts, pool.map(block, starts), strict=True):
            total += resized
            if progress:
                progress(min(start + BLOCK, len(names)), len(names), "decoding pictures")
    return images, total


def _decode(data: bytes, side: int) -> tuple[np.ndarray, bool]:
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as opened:
        image = ImageOps.exif_transpose(opened)
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
