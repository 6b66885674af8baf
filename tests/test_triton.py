"""The Triton kernels: interpreted on CPU (numbers), compiled for three architectures (resources),
and run where a GPU is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_interpreted():
    """In a process of its own: whether Triton interprets is settled when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "interpreted_linear.py"]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
