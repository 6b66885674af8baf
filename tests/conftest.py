"""Shared by all tests: GPU tests are skipped where there is none, seeds are fixed."""

import gc
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings
from tasks import threads

# A shell that runs the tests in the background has them ignore Control-C, and so all they start:
# the tests of Control-C would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What is imported and collected stays, hundreds of thousands of objects. To look at them for
# circles again and again took a sixth of the collection's time.
gc.disable()


# The same examples each time, however long one takes: on a busy machine all are slow. To look for
# other ones: pytest --hypothesis-profile=default.
settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    gc.freeze()  # nor is it searched once more at the end


def pytest_collection_modifyitems(items):
    # What is long begins early: at the end the other process would wait for it.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A test draws the same numbers whichever process runs it, and after whatever others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def nothing_else_runs():
    """Commands say nothing of a busy machine: many tests hold what they print to the letter."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tab.machine.load", lambda: 0.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_seeds_of_what_is_not_there():
    """torch.manual_seed keeps for a GPU what it cannot give to it yet, and the stack of the call as
    text, once for each kind of GPU: seconds of a whole run."""
    with pytest.MonkeyPatch.context() as patched:
        for kind in ("cuda", "mtia", "xpu"):
            if not getattr(torch, kind).is_available():
                patched.setattr(f"torch.{kind}.manual_seed_all", lambda seed: None)
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    with threads(1):
        yield
