"""One picture becomes 32×32 RGB: modes, transparency, 16 bits, orientation, several frames."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tab.data.decode import decoded


def read(image, form="PNG", **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return decoded(out.getvalue(), 32, "stretch")


def upright(width=64, height=128):
    """Red in the left half, blue in the right."""
    image = Image.new("RGB", (width, height), "blue")
    image.paste("red", (0, 0, width // 2, height))
    return image


def halves(picture):
    """Where the red half lies."""
    sides = {"left": picture[:, 2], "right": picture[:, 29], "top": picture[2], "low": picture[29]}
    red = [k for k, line in sides.items() if (line[:, 0] > 200).all() and (line[:, 2] < 55).all()]
    return red[0] if len(red) == 1 else red


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (40, 255), (40, 40, 40)),
        ("LA", (40, 0), (255, 255, 255)),  # transparent: white shows
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("I;16", 0x4D00, (77, 77, 77)),
    ],
)
def test_modes(mode, colour, expected):
    picture, resized = read(Image.new(mode, (32, 32), colour))
    assert (picture == np.array(expected, np.uint8)).all() and not resized


def test_cmyk_and_palette():
    cmyk = Image.new("CMYK", (32, 32), (0, 255, 255, 0))  # red
    picture, _ = read(cmyk, "JPEG", quality=100)
    assert np.abs(picture.astype(int) - [255, 0, 0]).max() < 8
    palette = Image.new("RGB", (32, 32), (10, 200, 30)).quantize(4)
    assert read(palette)[0][5, 5].tolist() == [10, 200, 30]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits(form):
    grey = Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64)
    picture, _ = read(grey, form)
    assert np.array_equal(picture[..., 1].ravel(), np.arange(1024) * 64 // 256)


def test_one_transparent_value():
    values = np.full((32, 32), 12800, np.uint16)
    values[3, 4] = 12345
    picture, _ = read(Image.fromarray(values), transparency=12345)
    assert picture[3, 4].tolist() == [255] * 3 and picture[0, 0].tolist() == [50] * 3
    colour = Image.new("RGB", (32, 32), (1, 2, 3))
    colour.putpixel((4, 3), (7, 8, 9))
    picture, _ = read(colour, transparency=(7, 8, 9))
    assert picture[3, 4].tolist() == [255] * 3 and picture[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("value", [-1, 65536])
def test_numbers_that_are_no_grey_of_sixteen_bits(value):
    with pytest.raises(ValueError, match=f"grey values run from {value} to {value}"):
        read(Image.new("I", (32, 32), value), "TIFF")
    with pytest.raises(ValueError, match="floating-point"):
        read(Image.new("F", (32, 32), 0.5), "TIFF")


def test_resized():
    picture, resized = read(upright())
    assert resized and picture.shape == (32, 32, 3) and halves(picture) == "left"
    assert picture[:, 2].tolist() == [[255, 0, 0]] * 32


# What the viewer does for each value of the tag, and where the left half comes to lie.
TURNED = dict(
    zip(range(1, 9), ["left", "right", "right", "left", "top", "top", "low", "low"], strict=True)
)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("tag, side", TURNED.items())
def test_orientation(form, tag, side):
    exif = Image.Exif()
    exif[0x0112] = tag
    assert halves(read(upright(), form, exif=exif)[0]) == side


def test_orientation_from_xmp():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    assert halves(read(upright(), pnginfo=info)[0]) == "top"


RATIONAL = struct.pack("<HHII", 0x011A, 10, 1, 38) + struct.pack("<Iii", 0, -1, 0)  # −1/0


@pytest.mark.parametrize(
    "tags, side",
    [
        (struct.pack("<HHHII", 2, 0x0112, 3, 1, 6) + RATIONAL, "top"),  # the other tag is broken
        (struct.pack("<HHHI", 1, 0x0112, 2, 2) + b"6\0\0\0" + bytes(4), "left"),  # as text
        (struct.pack("<HHHII", 9, 0x0112, 3, 1, 0) + bytes(4), "left"),  # no such orientation
        (struct.pack("<HHHII", 1, 0x0112, 3, 1, 99) + bytes(4), "left"),
        (b"\x40", "left"),  # ends in the middle
    ],
)
def test_broken_exif_leaves_the_picture(tags, side):
    exif = b"Exif\0\0II*\0\x08\0\0\0" + tags
    assert halves(read(upright(), "JPEG", exif=exif)[0]) == side


@pytest.mark.parametrize("form", ["GIF", "PNG", "TIFF", "WEBP", "MPO"])
def test_of_several_frames_the_first_counts(form):
    more = [Image.new("RGB", (32, 32), "blue")] * 2
    picture, _ = read(Image.new("RGB", (32, 32), "red"), form, save_all=True, append_images=more)
    assert np.abs(picture.astype(int) - [255, 0, 0]).max() < 8


def test_damage_after_the_header_is_an_error():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for form in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM"):
        out = io.BytesIO()
        Image.fromarray(noise).save(out, form)
        with pytest.raises(Exception):  # noqa: B017
            decoded(out.getvalue()[: len(out.getvalue()) // 2], 32, "stretch")
