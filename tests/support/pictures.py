"""Reports whose pictures nobody looks at: each is saved as a dot. Matplotlib takes nine tenths of
the time of a small comparison; tests/report, tests/api and tests/sweep look at what it draws."""

import base64
from pathlib import Path

import pytest

DOT = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="module", autouse=True)
def dots():
    """For the folder whose conftest.py imports it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tab.drawing.figures.Picture.savefig", _dot)
        yield


def _dot(self, path: Path, **options) -> None:
    Path(path).write_bytes(DOT if Path(path).suffix == ".png" else b"<svg/>")
