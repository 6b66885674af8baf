"""CUDA C++ without a GPU: the arithmetic run on the CPU, and what the compiled kernels take."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tab import kernel_report
from tab.ops.linear import backward_reference, forward_reference

HERE = Path(__file__).parent


class Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("heads", "n", "d", "dv", "feature_map")),
        ("eps", ctypes.c_float),
        ("mask", ctypes.c_void_p),
    ]


INPUTS = ["dout", "q", "k", "v", "o", "s0", "z0", "ds", "dz"]
OUTPUTS = ["out", "s", "z", "dq", "dk", "dv", "ds0", "dz0"]
LIKE = {"out": "dout", "dq": "q", "dk": "k", "dv": "v"}  # output -> the input with its layout


class Tensors(ctypes.Structure):
    _fields_ = [
        ("b", ctypes.c_int64),
        ("d_strides", ctypes.c_int64 * 3),
        ("dv_strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_void_p) for name in INPUTS + OUTPUTS),
    ]


@pytest.fixture(scope="module")
def linear_small(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("cuda") / "linear_small.so"
    command = [compiler, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    subprocess.run([*command, HERE / "linear_small.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library)).linear_small


@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "threads reversed"])
@pytest.mark.parametrize("n, d, dv", [(1, 3, 2), (5, 16, 24), (63, 33, 65), (64, 128, 128)])
@pytest.mark.parametrize("feature_map, state", [(0, True), (1, False), (2, True)])
def test_linear_small(linear_small, n, d, dv, feature_map, state, backwards, generator):
    """The phases of the kernel against the reference in float64; token-major strides, key mask."""
    b, h, eps = 2, 2, 0.5

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float()

    def tokens(size):
        return random(b, n, h, size).transpose(1, 2)

    x = {"q": tokens(d), "k": tokens(d), "v": tokens(dv), "dout": tokens(dv)}
    x |= {"s0": random(b, h, d, dv), "z0": random(b, h, d), "ds": random(b, h, d, dv)}
    x |= {"dz": random(b, h, d)}
    if feature_map == 2:  # features are positive
        x |= {name: x[name].abs() for name in ("q", "k")}
    x["z0"] = x["z0"].abs()
    if not state:
        x |= dict.fromkeys(("s0", "z0", "ds", "dz"))
    mask = torch.rand(b, n, generator=generator) > 0.3
    exact = {name: t if t is None else t.double() for name, t in x.items()}
    states = mask, exact["s0"], exact["z0"], feature_map, False, eps
    o, s, z = forward_reference(exact["q"], exact["k"], exact["v"], *states)
    x["o"] = o.float()  # token-major like dout
    grads = backward_reference(
        *(exact[i] for i in ("dout", "ds", "dz", "q", "k", "v")), o, s, z, *states
    )
    wanted = dict(zip(OUTPUTS, (o, s, z, *grads), strict=True))
    given = {name: torch.full_like(t, torch.nan, dtype=torch.float32) for name, t in wanted.items()}
    given |= {name: torch.full_like(x[like], torch.nan) for name, like in LIKE.items()}

    strides = [(ctypes.c_int64 * 3)(*x[i].stride()[:3]) for i in ("q", "v")]
    pointers = [None if t is None else t.data_ptr() for t in (x[i] for i in INPUTS)]
    pointers += [given[i].data_ptr() for i in OUTPUTS]
    sizes = Sizes(h, n, d, dv, feature_map, eps, mask.data_ptr())
    linear_small(ctypes.byref(Tensors(b, *strides, *pointers)), ctypes.byref(sizes), 128, backwards)
    for name in OUTPUTS:
        scale = max(1.0, wanted[name].abs().max().item())
        error = (given[name].double() - wanted[name]).abs().max().item() / scale
        assert error < 3e-6, f"{name}: relative error {error:.2g}"


def test_resources():
    """The kernels in the built library: all types and architectures, nothing spilled, they fit."""
    rows = kernel_report.built()
    if not rows:
        pytest.skip("tab._C_cuda was not built")
    assert {row["kernel"] for row in rows} == {"cuda Forward", "cuda Backward"}
    assert {row["config"].split()[0] for row in rows} == {"float", "__half", "__nv_bfloat16"}
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= row["limit"], row
        assert 0 < row["registers"] <= 255, row
