"""What tests of layers share."""

import warnings

import pytest


@pytest.fixture
def quiet():
    """flex says that it is dense, wherever it is not compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
