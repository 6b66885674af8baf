"""Builds the three extensions; everything else stands in pyproject.toml.

    tab._C        CPU kernels, LibTorch stable ABI: one build runs on torch ≥ 2.11
    tab._C_cuda   CUDA kernels, same ABI, a library of its own: a CPU-only torch never loads it
    tab._host     pybind11 without torch: batch assembly and build facts

TAB_CUDA=auto (default) builds tab._C_cuda when a CUDA toolkit is found, with or without a GPU;
TAB_CUDA=1 insists on it; TAB_CUDA=0 leaves it out. MAX_JOBS and TORCH_CUDA_ARCH_LIST are respected.
TAB_SANITIZE=1 builds the first and the last under AddressSanitizer and UndefinedBehaviorSanitizer,
for `make sanitize` (tests/support/sanitized.py): such a library only loads with libasan preloaded.
"""

import os
import shutil
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup


def cuda_home() -> Path | None:
    """The folder that holds include/cuda_runtime.h; an nvcc on the PATH may be a mere wrapper."""
    nvcc = shutil.which("nvcc")
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    guesses += [Path(nvcc).resolve().parents[1]] if nvcc else []
    homes = (Path(guess) for guess in guesses if guess)
    return next((home for home in homes if (home / "include/cuda_runtime.h").is_file()), None)


def want_cuda() -> bool:
    switch, home = os.environ.get("TAB_CUDA", "auto"), cuda_home()
    if switch not in ("auto", "0", "1"):
        raise SystemExit(f"TAB_CUDA={switch} is none of auto, 0, 1")
    if switch == "1" and home is None:
        raise SystemExit(
            "TAB_CUDA=1, but no CUDA toolkit: no include/cuda_runtime.h under CUDA_HOME, "
            "CUDA_PATH, /usr/local/cuda or beside nvcc. Install one, set CUDA_HOME, or build with "
            "TAB_CUDA=0."
        )
    if switch == "0" or home is None:
        return False
    os.environ["CUDA_HOME"] = str(home)  # before torch looks
    # Ampere, Hopper, Blackwell, and PTX for what comes after.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
    return True


with_cuda = want_cuda()

from pybind11.setup_helpers import Pybind11Extension  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402

TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the oldest libtorch we run on: 2.11
CXX = ["-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-Wall", TORCH_TARGET]
NVCC = ["-O3", "-std=c++20", "-DUSE_CUDA", "-Xptxas=-v", "-Xcompiler=-Wall", TORCH_TARGET]

SANITIZE = []
if os.environ.get("TAB_SANITIZE") == "1":  # -O1: a third of the time to compile, and exact lines
    checks = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    SANITIZE = [*checks, "-O1", "-g1", "-fno-omit-frame-pointer"]

extensions = [
    cpp_extension.CppExtension(
        "tab._C",
        sorted(glob("csrc/cpu/**/*.cpp", recursive=True)),
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        py_limited_api=True,
        extra_compile_args={"cxx": [*CXX, *SANITIZE]},
        extra_link_args=["-fopenmp", *SANITIZE],
    ),
    Pybind11Extension(
        "tab._host",
        ["csrc/host.cpp"],
        cxx_std=17,
        extra_compile_args=["-O3", "-pthread", "-Wall", *SANITIZE],
        extra_link_args=SANITIZE,
    ),
]
if with_cuda:
    extensions.append(
        cpp_extension.CUDAExtension(
            "tab._C_cuda",
            sorted(glob("csrc/cuda/**/*.cu", recursive=True)),
            depends=sorted(glob("csrc/**/*.*h", recursive=True)),
            py_limited_api=True,
            extra_compile_args={"cxx": CXX, "nvcc": NVCC},
        )
    )

setup(
    packages=[*find_packages(include=["tab", "tab.*"]), "tab.kernels"],
    package_dir={"tab.kernels": "kernels"},
    package_data={
        "tab": [
            "recipe/published.csv",
            *("recipe/recipes/*.toml", "sweep/spaces/*.toml", "web/*.css", "web/*.js"),
        ]
    },
    ext_modules=extensions,
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
