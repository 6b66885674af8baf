"""The C++ kernels in the instruction sets below the widest one, which all other tests run in."""

import os
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from backends import needs_cpp
from forks import python
from paths import SUPPORT

pytestmark = needs_cpp("linear_fwd")


def run(isa: str, *words: object) -> CompletedProcess:
    """Python in a process of its own: the first kernel that runs settles the instruction set."""
    environment = {**os.environ, "TAB_ISA": isa}
    return python(*words, folder=SUPPORT, environment=environment)


@pytest.mark.slow
@pytest.mark.any_torch
@pytest.mark.parametrize("isa", ("baseline", "avx2"))
def test_lower_ones_pass_the_tests_that_ask_for_it(isa):
    """Those of the kernels: the reference runs in whatever torch chooses."""
    if isa.upper() == torch.backends.cpu.get_cpu_capability():
        pytest.skip(f"{isa} is the widest here, in which all tests run")
    marked = [
        p for p in Path(__file__).parent.glob("test_*.py") if "mark.each_isa" in p.read_text()
    ]
    kernels = "-k", "not reference or agrees_with_the_reference"
    done = run(isa, "-m", "pytest", "-q", "-x", "-m", "each_isa", *kernels, *marked)
    if "does not have it" in done.stdout:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.any_torch
def test_an_unknown_one_is_refused():
    done = run("sse9", "-c", "import torch, tab; x = torch.ones(1, 1, 1, 1); "
               "tab.linear_attention(x, x, x)")  # fmt: skip
    assert done.returncode and "TAB_ISA=sse9 is none of baseline, avx2, avx512" in done.stderr
