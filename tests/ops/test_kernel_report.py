"""What the kernel report says of a kernel, and which ones it refuses; nothing runs."""

import multiprocessing
import operator

import pytest
import torch

from tab.doctor import kernel_kept, kernel_report
from tab.doctor.kernel_floors import BANDWIDTH, RATES, call_floors
from tab.doctor.kernel_launches import Launch, chosen, launches, precision, sums, weight, without
from tab.doctor.kernel_limits import ALONE, SPILLS, faults
from tab.doctor.kernel_report import compiled, resident

pytest.importorskip("triton")
import triton
import triton.language as tl

# --- what is held against limits ------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch, registers, shared, warps, blocks",
    [
        (90, 133, 28672, 8, 1),  # 136 registers of 256 threads: the second block lacks 4 KiB
        (90, 122, 28672, 8, 2),
        (90, 32, 0, 4, 16),  # as many warps as there are places
        (90, 64, 113 * 1024, 4, 2),  # memory to the last byte
        (90, 64, 113 * 1024 + 1, 4, 1),
        (80, 255, 98304, 8, 1),
    ],
)
def test_resident_warps(arch, registers, shared, warps, blocks):
    held = {"blocks": blocks, "warps": warps * blocks}
    assert resident(arch, registers, shared, warps) == held


@triton.jit
def greedy(x, y, z, SIZE: tl.constexpr):
    """A product whose operands fill the shared memory of a multiprocessor."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(z + at, tl.dot(tl.load(x + at), tl.load(y + at), input_precision="tf32"))


def test_a_kernel_alone_on_its_multiprocessor_is_refused():
    x = torch.empty(128, 128, device="meta")
    row = compiled("made_up", Launch(greedy, (x, x, x), {"SIZE": 128, "num_warps": 4}), 80)
    assert row["blocks"] == 1 and row["warps"] == 4
    (fault,) = faults([row])
    assert fault.startswith("made_up: greedy, sm_80") and "1 block of 4 warps" in fault
    small = compiled("made_up", Launch(greedy, (x, x, x), {"SIZE": 32, "num_warps": 4}), 80)
    assert small["warps"] >= 16 and not faults([small])


ROW = {"op": "linear", "kernel": "k", "config": "", "arch": 90, "precision": "bf16", "blocks": 1}
ROW |= {"without": "", "registers": 133, "spilled": 0, "shared": 28672, "limit": 232448, "warps": 8}
BENT = {"kernel": "mla_grad_kv", "arch": 80, "warps": 16}


@pytest.mark.parametrize(
    "more, said",
    [
        (
            {},
            "1 block of 8 warps on a multiprocessor",
        ),  # 133 registers of 256 threads: the second block lacks 4 KiB
        ({"blocks": 2, "warps": 16}, None),
        ({"warps": 16}, None),
        ({"precision": "tf32x3"}, None),
        (
            {"kernel": "local_forward", "config": "bf16 D=64 DV=64"},
            "1 block of 8 warps on a multiprocessor",
        ),
        ({"kernel": "local_forward", "config": "bf16 D=64 DV=128"}, None),
        ({"kernel": "linear_fused_backward"}, "1 block of 8 warps on a multiprocessor"),
        ({"kernel": "linear_fused_backward", "arch": 80}, None),
        ({"kernel": "cuda LinearForward"}, None),
        ({"warps": 16, "spilled": 129}, "129 bytes spilled a thread, 128 are known"),
        ({"warps": 16, "spilled": 512, "kernel": "performer_fused"}, None),
        (BENT | {"spilled": 800}, None),
        (BENT | {"spilled": 800, "without": "slopes"}, "800 bytes spilled a thread, 640 are known"),
        (BENT | {"spilled": 800, "arch": 90}, "800 bytes spilled a thread, 192 are known"),
        ({"warps": 16, "shared": 232449}, "232449 bytes of shared memory, of 232448"),
    ],
)
def test_faults(more, said):
    found = faults([ROW | more])
    assert [text.rpartition(": ")[2] for text in found] == ([said] if said else [])


def test_known_faults_are_of_kernels_that_are_launched():
    found = {x.kernel.__name__ for each in launches(80).values() for x in each}
    assert {x.kernel for x in (*SPILLS, *ALONE)} - found == {"cuda"}


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_what_is_known_can_be_asked_of_every_launch(arch):
    """As if each took too much: a condition may name no argument that a kernel does not have."""
    row = ROW | {"arch": arch, "spilled": 10**6}
    for found in launches(arch).values():
        for launch in found:
            config = " ".join(f"{x}={y}" for x, y in launch.options.items())
            told = {"kernel": launch.kernel.__name__, "config": config, "without": without(launch)}
            assert faults([row | told | {"precision": precision(launch)}])


# --- what is compiled -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_some_stand_for_all(arch):
    """None is left out but for one of the same sums, of this op or another with the same kernel,
    that has each of its operands and asks for as much of everything."""
    every, few = launches(arch), chosen(arch)
    count, whole = (sum(map(len, x.values())) for x in (few, every))
    assert list(few) == list(every) and count < 0.55 * whole
    assert sum(map(len, chosen(arch, every=True).values())) == whole
    left = [x for found in few.values() for x in found]
    for launch in (x for found in every.values() for x in found):
        assert any(
            x.kernel is launch.kernel
            and sums(x) == sums(launch)
            and {*without(x).split()} <= {*without(launch).split()}
            and all(map(operator.ge, weight(x), weight(launch)))
            for x in left
        )


def test_an_op_stands_for_another_only_where_both_are_asked_for():
    """Gated linear attention has the kernels of the normalized form, and fewer operands."""
    both, alone = chosen(90), chosen(90, ops={"gated_linear"})
    assert [*alone] == ["gated_linear"] and len(both["gated_linear"]) < len(alone["gated_linear"])
    plain, divided = both["gated_linear"], both["gated_linear_normalized"]
    assert {x.kernel.__name__ for x in alone["gated_linear"]} <= {
        x.kernel.__name__ for x in [*plain, *divided]
    }
    wide = [x for x in plain if x.options.get("PRECISION") == "tf32x3"]
    assert wide and all(x.options["D"] == 128 for x in wide)  # which the other does not take


def test_one_that_asks_for_more_of_something_is_compiled():
    """gated_walk in float32: heads 64 wide with a state to write, and 128 wide without."""
    alone = chosen(90, ops={"gated_linear"})["gated_linear"]
    found = [x for x in alone if x.kernel.__name__ == "gated_walk"]
    full = [x.options["D"] for x in found if x.options["PRECISION"] == "tf32x3"]
    assert {64, 128} <= {*full}
    plain = [without(x) for x in chosen(80)["mla"] if x.kernel.__name__ == "mla_grad_kv"]
    assert {"", "slopes cap"} <= {*plain}


def test_one_that_only_lacks_a_state_is_not():
    found = [x for x in launches(90)["linear"] if x.kernel.__name__ == "linear_fused"]
    assert {without(x) for x in found} == {"", "s0 z0 s z"}
    few = [x for x in chosen(90)["linear"] if x.kernel.__name__ == "linear_fused"]
    assert {without(x) for x in few} == {""}


def test_rows_are_kept(monkeypatch, tmp_path):
    """The next report compiles nothing; after another source or setting it does."""
    asked = []

    def compiled(op, launch, arch):
        asked.append(launch.kernel.__name__)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return {"kernel": launch.kernel.__name__, "arch": arch}

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_report, "compiled", compiled)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):  # the first row is kept
        kernel_report.report_rows((90,), {"h2o"}, every=True)
    rows = kernel_report.report_rows((90,), {"h2o"}, every=True)
    assert len(rows) == 4 and len(asked) == 5
    assert kernel_report.report_rows((90,), {"h2o"}, every=True) == rows and len(asked) == 5
    kernel_report.report_rows((80,), {"h2o"}, every=True)
    assert len(asked) == 9
    monkeypatch.setattr(kernel_kept, "_state", lambda: "other sources")
    kernel_report.report_rows((90,), {"h2o"}, every=True)
    assert len(asked) == 13
    (tmp_path / "cache" / "tab-kernel-report-other sources.json").write_text("{")
    kernel_report.report_rows((90,), {"h2o"}, every=True)  # a broken file is made anew
    assert len(asked) == 17


def test_processes_compile_side_by_side(monkeypatch, tmp_path):
    """Each launch once, in the order that one process has; nothing is left to run behind them."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    told = []
    rows = kernel_report.report_rows((90,), {"moe"}, lambda *x: told.append(x))
    found = chosen(90)["moe"]
    assert [x[:2] for x in told] == [(i + 1, len(found)) for i in range(len(found))]
    assert [x["kernel"] for x in rows] == [x.kernel.__name__ for x in found]
    assert len(list(tmp_path.glob("*/*.cubin"))) == len(found)
    assert rows[-1] == compiled("moe", found[-1], 90)
    assert not multiprocessing.active_children()


# --- the least that a call needs ------------------------------------------------------------------


def test_floors():
    """Of linear attention at CIFAR's size, from its shapes alone."""
    rows = call_floors(ops={"linear"})
    row = next(x for x in rows if (x["op"], x["type"]) == ("linear_fwd", "bf16"))
    bh, n, d = 512 * 8, 64, 64
    assert row["size"] == f"512×8×{n}×{d}" and row["flops"] == 4 * bh * n * d * d
    state = 4 * bh * (d * d + d)  # float32, given and returned
    assert row["bytes"] == 4 * 2 * bh * n * d + 2 * state + 512 * n  # q, k, v, o; mask
    assert row["bound"] == "memory"
    assert row["floor_us"] == pytest.approx(1e6 * row["bytes"] / BANDWIDTH)
    (launch,) = row["launches"]
    assert launch["kernel"] == "linear_fused" and launch["bytes"] == row["moved"] == row["bytes"]
    wide = next(x for x in rows if x["op"] == "linear_fwd" and x["size"].endswith("8192×256"))
    assert wide["bound"] == "arithmetic" and wide["type"] == "fp32"
    assert wide["floor_us"] == pytest.approx(1e6 * wide["flops"] / RATES["tf32x3"])
    assert len(wide["launches"]) == 3 and wide["moved"] > wide["bytes"]


def test_every_op_has_a_floor():
    rows = call_floors()
    assert {row["op"].partition("_")[0] for row in rows} >= {"linear", "local", "sparse", "mla"}
    assert all(row["floor_us"] > 0 and row["launches"] for row in rows)
