"""One picture file as a uint8 RGB array.

Turned as its EXIF or XMP says, transparency laid over white, grey, palette, CMYK and 16-bit grey
converted to RGB, and made a square: its centre cut out, or stretched. Of several frames or pages
the first counts. Orientation that cannot be read is none: viewers show such a picture as it lies.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
NAMES = "JPEG, PNG, WebP, BMP, GIF, TIFF and PPM"
# A file that ends so is meant as a picture: one that cannot be read is an error, not passed over.
ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".jp2", ".tga", ".svg"),
)
BLOCK = 250  # pictures decoded by a thread between two reports of progress
NAMED = 20  # broken files in one error
Progress = Callable[[int, int, str], None]  # (done, total, what)
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def looks_like_picture(start: bytes) -> bool:
    """Whether a file without a picture's ending, of which these are the first bytes, is one."""
    known = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
    return start.startswith(known) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def decode_all(
    count: int,
    fetch: Callable[[int, int], list[bytes]],
    at: Callable[[int], str],
    side: int,
    fit: str,
    progress: Progress | None,
) -> tuple[np.ndarray, int]:
    """(images uint8 (count, side, side, 3), how many had another size).

    fetch(start, stop): these pictures' files. at(i): where the i-th lies, for a ValueError.
    """
    images = np.empty((count, side, side, 3), np.uint8)
    broken: dict[int, Exception] = {}  # all of them, so that nobody meets one after the other

    def block(start: int) -> int:
        resized = 0
        for i, data in enumerate(fetch(start, min(start + BLOCK, count)), start):
            try:
                images[i], other = decoded(data, side, fit)
                resized += other
            except Exception as error:  # Pillow raises whatever its readers stumble over
                broken[i] = error
        return resized

    total, starts = 0, range(0, count, BLOCK)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start, resized in zip(starts, pool.map(block, starts), strict=True):
            total += resized
            if progress:
                progress(min(start + BLOCK, count), count, "decoding pictures")
    if broken:
        raise ValueError(_said(broken, at)) from broken[min(broken)]
    return images, total


def _said(broken: dict[int, Exception], at: Callable[[int], str]) -> str:
    files = [f"{at(i)} is no whole picture ({_short(broken[i])})" for i in sorted(broken)]
    if len(files) == 1:
        return f"{files[0]}; replace or remove it"
    more = f"; {len(files) - NAMED:,} more" if len(files) > NAMED else ""
    return f"{len(files):,} files to replace or remove: {'; '.join(files[:NAMED])}{more}"


def _short(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own text names an object in memory
        return f"it does not begin as one; {NAMES} can be read"
    return str(error) or type(error).__name__


def resized_note(count: int, side: int, fit: str) -> str:
    """What a data set's note says of pictures of other sizes."""
    if not count:
        return ""
    how = " after cutting out their centres" if fit == "crop" else ""
    return f", {count:,} of them resized to {side}×{side}{how}"


def shared_note(train: np.ndarray, test: np.ndarray) -> str:
    """The same of test pictures that were trained on: a copy of a file, or a split drawn twice."""
    known = {hashlib.sha256(image).digest() for image in train}
    count = sum(hashlib.sha256(image).digest() in known for image in test)
    if not count:
        return ""
    return f"; {count:,} of the test pictures are in train, too, pixel by pixel"


def resized_array(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 (N, H, H, 3) -> uint8 (N, side, side, 3)."""
    if images.shape[1] == side:
        return images
    new = np.empty((len(images), side, side, 3), np.uint8)
    for i, image in enumerate(images):
        new[i] = np.asarray(squared(Image.fromarray(image), side, "stretch"))
    return new


def squared(image: Image.Image, side: int, fit: str) -> Image.Image:
    """Of side × side pixels. fit: "crop" resizes the short side and cuts out the centre, "stretch"
    resizes both."""
    if image.size == (side, side):
        return image
    if fit == "crop":
        return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    return image.resize((side, side), Image.Resampling.BICUBIC)


def decoded(data: bytes, side: int, fit: str) -> tuple[np.ndarray, bool]:
    """(uint8 (side, side, 3), whether it had another size); any exception: it cannot be read."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        opened.load()  # what is wrong with its pixels is said here
        image = _turned(opened)
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers of unknown range")
        if image.mode.startswith("I"):
            image = _eight_bits(image)
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        return np.asarray(squared(image, side, fit)), image.size != (side, side)


def _turned(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it writes the other tags anew, and fails where one is broken.
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow raises whatever its TIFF reader stumbles over
        return image
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, which convert() would clip to white."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its grey values run from {values.min()} to {values.max()}")
    grey = (values.astype(np.uint32) >> 8).astype(np.uint8)
    if (clear := image.info.get("transparency")) is not None:
        grey[values == clear] = 255
    return Image.fromarray(grey)
