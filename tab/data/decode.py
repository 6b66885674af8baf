"""One picture file as a uint8 RGB array.

Turned as its EXIF or XMP says, transparency laid over white, grey, palette, CMYK and 16-bit grey
converted to RGB, and stretched to a square whatever its proportions. Of several frames or pages
the first counts. Orientation that cannot be read is none: viewers show such a picture as it lies.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
NAMES = "JPEG, PNG, WebP, BMP, GIF, TIFF and PPM"
# A file that ends so is meant as a picture: one that cannot be read is an error, not passed over.
ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".jp2", ".tga", ".svg"),
)
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


def decoded(data: bytes, side: int) -> tuple[np.ndarray, bool]:
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
        other = image.size != (side, side)
        if other:
            image = image.resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(image), other


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
