"""Fixtures that several files on operators share."""

import pytest
from textbook.gated_linear import DECAYS

from tab import use_backend


@pytest.fixture(params=DECAYS, ids=lambda case: " ".join(case))
def decay(request):
    """The decay of each head, token or channel, under a backend that knows it."""
    name, backend = request.param
    with use_backend(backend):
        yield name
