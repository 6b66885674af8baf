"""Two processes train every layer, by DDP and by FSDP2: they agree, with one process too."""

import pytest
import torch
from forks import python
from paths import SUPPORT
from ranks import KINDS, MODELS, build

# Both are forks of a process that has loaded all that they need, and used nothing of it.
BOTH = """
import sys
sys.path.insert(0, sys.argv[2])
from ranks import work
from torch.multiprocessing import start_processes
start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of both ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    done = python("-W", "ignore", "-c", BOTH, folder, SUPPORT)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", [*KINDS, *MODELS])
def test_ranks_agree(found, kind, way):
    (first, alone), (second, _) = (rank[kind, way] for rank in found)
    assert first.keys() == second.keys() == alone.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], alone[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_the_statistics_did_something(found, way):
    """What is compared above is not the beginning."""
    after = {kind: found[0][kind, way][0] for kind in KINDS}
    for kind in ("deepseek_mla", "kimi_k2", "kimi_k2 mla"):
        assert after[kind]["moe.bias"].abs().max() > 0.05
    for kind, name in (("kimi_k2", "attention.qkv.weight"), ("kimi_k2 mla", "attention.w_uk")):
        before = build(kind).state_dict()[name]
        rows = slice(32) if kind == "kimi_k2" else slice(None)  # of q and k
        assert after[kind][name][rows].norm() < 0.9 * before[rows].norm()
    assert after["performer"]["steps"] == 3
    assert not torch.equal(after["performer"]["projection"], build("performer").projection)
