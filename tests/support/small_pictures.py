"""A small set of pictures for the tests of data, as a folder and in archives."""

import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

from PIL import Image

CLASSES = ("apple", "pear")


def build(folder: Path) -> Path:
    """3 train and 2 test pictures a class, PNG 32×32; colours tell who is who."""
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                colour = (100 * label, 10 * i, 255 if split == "test" else 0)
                Image.new("RGB", (32, 32), colour).save(folder / f"{split}/{name}/{i}.png")
    return folder


def picture(colour=(9, 8, 7), form="PNG", **options) -> bytes:
    """One of 32×32, as a file."""
    out = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(out, form, **options)
    return out.getvalue()


def pack(folder: Path, archive: Path, mode: str = "w:xz", prefix: str = "top") -> Path:
    """The folder as tar writes it: links as links, a second name of a file as a hard link."""
    with tarfile.open(archive, mode) as tar:
        tar.add(folder, prefix)
    return archive


class _Entry(zipfile.ZipInfo):
    """The library marks names beyond ASCII as UTF-8; here they are bytes, and not marked."""

    def _encodeFilenameFlags(self):
        return self.filename.encode("cp437"), 0


def pack_zip(folder: Path, archive: Path, prefix: str = "top") -> Path:
    """The folder as `zip -ry` writes it: bytes of names as they are, links as links."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
        for path in sorted(folder.rglob("*")):
            name = os.fsencode(f"{prefix}/{path.relative_to(folder)}").decode("cp437")
            info = _Entry(name + "/" * (path.is_dir() and not path.is_symlink()))
            mode = path.lstat().st_mode
            info.external_attr = mode << 16
            if stat.S_ISLNK(mode):
                made.writestr(info, os.fsencode(os.readlink(path)))
            elif stat.S_ISREG(mode):
                made.writestr(info, path.read_bytes())
            else:
                made.writestr(info, b"")
    return archive
