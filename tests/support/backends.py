"""What a test asks of the build, and the backends that it is repeated on."""

import pytest

from tab.ops import OPS


def needs_cpp(op: str) -> pytest.MarkDecorator:
    """Skipped, with the reason, where the C++ kernel of an op is not built."""
    reason = OPS[op].why_not("cpp")
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def reference_and_cpp(op: str) -> tuple:
    return "reference", pytest.param("cpp", marks=needs_cpp(op))
