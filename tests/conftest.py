"""Shared by all tests: GPU tests are skipped where there is none, seeds are fixed."""

import gc
import signal

import pytest
import torch
from tasks import threads

# A shell that runs the tests in the background has them ignore Control-C, and so all they start:
# the tests of Control-C would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What is imported and collected stays, hundreds of thousands of objects. To look at them for
# circles again and again took a sixth of the collection's time.
gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def nothing_else_runs():
    """Commands say nothing of a busy machine: many tests hold what they print to the letter."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tab.machine.load", lambda: 0.0)
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    with threads(1):
        yield
