"""Memory of large CPU outputs is torch's own, and used again where glibc allows (csrc/empty.h)."""

import os
import platform
import resource
from subprocess import CompletedProcess

import pytest
import torch
from backends import needs_cpp
from forks import python

import tab

pytestmark = needs_cpp("linear_fwd")

Q = torch.randn(1, 1, 16384, 64)  # an output of 4 MiB


def attend(value: float) -> torch.Tensor:
    return tab.linear_attention(Q, Q, torch.full_like(Q, value), backend="cpp")


def test_held_memory_is_never_given_away():
    kept = [attend(value) for value in range(1, 6)]
    view = kept[0][0, 0, 5:6]  # a view holds the memory too
    del kept[0]
    later = [attend(value) for value in range(6, 10)]
    assert len({x.data_ptr() for x in kept + later}) == 8
    for value, x in enumerate(kept + later, start=2):
        torch.testing.assert_close(x, torch.full_like(Q, float(value)))
    torch.testing.assert_close(view, torch.ones_like(view))


def test_a_storage_is_resized_like_any_other():
    """As FSDP does: to nothing and back. Memory of a pool of our own could not be."""
    o = attend(3)
    storage, size = o.untyped_storage(), o.untyped_storage().nbytes()
    storage.resize_(0)
    assert storage.nbytes() == 0
    storage.resize_(size)
    o.copy_(torch.full_like(Q, 3.0))
    torch.testing.assert_close(o, attend(3))
    storage.resize_(2 * size)  # larger: what was there stays
    torch.testing.assert_close(o, attend(3))


OUTPUTS = """
import resource, torch, tab
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
q, v = torch.randn(1, 1, 262144, 2), torch.randn(1, 1, 262144, 64)  # an output of 64 MiB
for _ in range(24):  # glibc settles after a few
    before = faults()
    o = tab.linear_attention(q, q, v, backend="cpp")
    del o
print(faults() - before)
"""


def run(keep: str, script: str) -> CompletedProcess:
    return python("-W", "ignore", "-c", script, environment=os.environ | {"TAB_KEEP_MIB": keep})


@pytest.mark.any_torch
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_serves_the_next_output():
    pages = 64 * 2**20 // resource.getpagesize()
    assert int(run("512", OUTPUTS).stdout) < pages * 0.01
    # Kept back by nothing, it comes from the system anew: in pages, or in large ones.
    assert int(run("0", OUTPUTS).stdout) > 16
    wrong = run("many", OUTPUTS)
    assert wrong.returncode and "TAB_KEEP_MIB=many is no number of MiB" in wrong.stderr


FAULTS = """
import resource, torch
from tab.machine import keep_freed_memory
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
keep_freed_memory()
x, w = torch.ones(16, 3000), torch.zeros(3000, 6000, requires_grad=True)  # 72 MB
for _ in range(24):  # glibc settles after a few
    before = faults()
    (x @ w).sum().backward()
    w.grad = None
print(faults() - before)
"""


@pytest.mark.any_torch
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_training_keeps_freed_memory():
    pages = 72_000_000 // resource.getpagesize()
    assert int(run("0", FAULTS).stdout) > pages * 0.9
    assert int(run("512", FAULTS).stdout) < pages * 0.1
    wrong = run("many", FAULTS)
    assert wrong.returncode and "TAB_KEEP_MIB=many is no number of MiB" in wrong.stderr
