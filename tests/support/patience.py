"""How long a test waits for what ought to come."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Seconds after which it has failed: more than a test takes that passes, however many other
# processes want the cores.
PATIENCE = 900


def until(true: Callable[[], object]) -> bool:
    """Waits for `true()`, with patience."""
    end = time.monotonic() + PATIENCE
    while not (said := true()) and time.monotonic() < end:
        time.sleep(0.05)
    return bool(said)


def tick(file: Path) -> None:
    """Waits until what is written is later than `file`: the clock that the system stamps files with
    moves on every few milliseconds."""
    with tempfile.NamedTemporaryFile() as other:

        def later() -> bool:
            os.utime(other.name)
            return os.stat(other.name).st_ctime_ns > file.stat().st_ctime_ns

        assert until(later)
