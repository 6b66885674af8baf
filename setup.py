"""Builds the three extensions; everything else stands in pyproject.toml.

    tab._C        CPU kernels, LibTorch stable ABI: one build runs on torch ≥ 2.11
    tab._C_cuda   CUDA kernels, same ABI, a library of its own: a CPU-only torch never loads it
    tab._host     batch assembly, without torch

TAB works without any of them, on its PyTorch references. So what does not compile is left out, with
the reason (`tab doctor` repeats it), unless it was asked for:

    TAB_CPP=auto (default), 0, 1    tab._C and tab._host: if they compile; never; or fail
    TAB_CUDA=auto (default), 0, 1   tab._C_cuda: if a GPU is visible (or FORCE_CUDA=1 is set), and a
                                    toolkit is found and compiles it; never; or fail
    MAX_JOBS, TORCH_CUDA_ARCH_LIST, CXX, CUDA_HOME    as PyTorch's extensions read them
    TAB_DEBUG=1                     keeps the debugging symbols (27 MB instead of 4)
    TAB_SANITIZE=1                  AddressSanitizer and UndefinedBehaviorSanitizer in tab._C and
                                    tab._host, for `make sanitize`; they load with libasan preloaded
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from glob import glob
from pathlib import Path

from setuptools import find_namespace_packages, setup

WINDOWS, LINUX = os.name == "nt", sys.platform == "linux"


def how(extension: str) -> str:
    """The switch that insists on it."""
    return "TAB_CUDA" if extension == "tab._C_cuda" else "TAB_CPP"


def switch(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}={value} is none of auto, 0, 1")
    return value


def cuda_home() -> Path | None:
    """The folder that holds include/cuda_runtime.h; an nvcc on the PATH may be a mere wrapper."""
    nvcc = shutil.which("nvcc")
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    guesses += [Path(nvcc).resolve().parents[1]] if nvcc else []
    homes = (Path(guess) for guess in guesses if guess)
    return next((home for home in homes if (home / "include/cuda_runtime.h").is_file()), None)


def gpu_visible() -> bool:
    """Asked of the driver, since the torch of an isolated build may be another."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout.startswith(b"GPU ")
    except OSError:
        return False


def want_cuda() -> bool:
    wish, home = switch("TAB_CUDA"), cuda_home()
    if wish == "1" and home is None:
        raise SystemExit(
            "TAB_CUDA=1, but no CUDA toolkit: no include/cuda_runtime.h under CUDA_HOME, "
            "CUDA_PATH, /usr/local/cuda or beside nvcc. Install one, set CUDA_HOME, or build with "
            "TAB_CUDA=0."
        )
    forced = wish == "1" or os.environ.get("FORCE_CUDA") == "1"
    if wish == "0" or home is None or not (forced or gpu_visible()):
        return False
    os.environ["CUDA_HOME"] = str(home)  # before torch looks
    # Ampere, Hopper, Blackwell, and PTX for what comes after.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
    return True


with_cpp, with_cuda = switch("TAB_CPP") != "0", want_cuda()
SANITIZE = os.environ.get("TAB_SANITIZE") == "1"
left_out = {}  # extension -> why; what is left out by a switch needs no reason

try:
    from torch.utils import cpp_extension

    Build = cpp_extension.BuildExtension
except ImportError as error:  # built without isolation, where torch is still to be installed
    from setuptools.command.build_ext import build_ext as Build

    cpp_extension = None
    for name, wanted in (("tab._C", with_cpp), ("tab._C_cuda", with_cuda)):
        if wanted:
            left_out[name] = f"it needs torch to be built, which does not import here: {error}"


@contextmanager
def tee():
    """What compilers write to stdout and stderr goes on to both and into the file that is given."""
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as log:
        try:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            yield log
        finally:
            for stream, before in zip((1, 2), saved, strict=True):
                os.dup2(before, stream)
                os.close(before)
            log.seek(0)
            shutil.copyfileobj(log, sys.stdout.buffer)
            sys.stdout.flush()


class BuildWhatCompiles(Build):
    """Each extension for itself: one that fails costs only itself."""

    def finalize_options(self):
        """Objects stay, so that the next build compiles only what has changed: setuptools would
        build an editable install in a folder that it throws away."""
        super().finalize_options()
        self.build_temp = "build/sanitized" if SANITIZE else "build/objects"

    def run(self):
        wanted, compiler, built = self.extensions, self.compiler, []
        for extension in wanted:
            self.extensions, self.compiler = [extension], compiler
            with tee() as log:
                try:
                    super().run()
                    built.append(extension)
                except (Exception, SystemExit) as error:
                    if os.environ.get(how(extension.name)) == "1":
                        raise
                    log.seek(0)
                    left_out[extension.name] = reason(log.read().decode(errors="replace"), error)
        self.extensions = built
        for name, why in left_out.items():
            print(f"tab: {name} is left out; TAB works without it, more slowly", file=sys.stderr)
            print(f"tab:   {why}", file=sys.stderr)
            print(f"tab:   to insist on it: {how(name)}=1 pip install …", file=sys.stderr)
        self.remember()

    def remember(self):
        """For `tab doctor`: pip shows nothing of a build that succeeds."""
        folder = Path("tab" if self.inplace else Path(self.build_lib, "tab"))
        notes = folder / "left_out.json"
        notes.unlink(missing_ok=True)
        if left_out:
            folder.mkdir(parents=True, exist_ok=True)
            said = {name: f"{why}; to insist: {how(name)}=1" for name, why in left_out.items()}
            notes.write_text(json.dumps(said, indent=1), encoding="utf-8")


def reason(log: str, error: BaseException) -> str:
    """The compiler's first error, or its last word, or what Python says."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said_by_others = re.compile(r"ninja:|FAILED|\[|W\d{4} ")  # the last: torch's own warnings
    lines = [line for line in lines if not said_by_others.match(line)]
    errors = [line for line in lines if "error:" in line or line.endswith("not found")]
    return (errors or lines[-1:] or [f"{type(error).__name__}: {error}"])[0][:300]


TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the oldest libtorch we run on: 2.11
WIDE = ["/O2", "/std:c++20", "/EHsc"] if WINDOWS else ["-O3", "-std=c++20", "-Wall"]
CXX = [*WIDE, *([] if WINDOWS else ["-fvisibility=hidden"])]
NVCC = ["-O3", "-std=c++20", "-DUSE_CUDA", "-Xptxas=-v", TORCH_TARGET]
NVCC += [] if WINDOWS else ["-Xcompiler=-Wall"]
LINK = []
if SANITIZE:  # -O1: a third of the time to compile, and exact lines
    checks = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    LINK = [*checks, "-O1", "-g1", "-fno-omit-frame-pointer"]
    CXX += LINK
elif os.environ.get("TAB_DEBUG") != "1" and not WINDOWS:
    CXX += ["-g0"]  # Python's own flags hold -g
    LINK = ["-s"] if LINUX else []

extensions = []
if with_cpp:
    from pybind11.setup_helpers import Pybind11Extension

    extensions.append(
        Pybind11Extension(
            "tab._host",
            ["csrc/host.cpp"],
            cxx_std=20,
            py_limited_api=True,
            extra_compile_args=[*CXX, *([] if WINDOWS else ["-pthread"])],
            extra_link_args=LINK,
        )
    )
if with_cpp and cpp_extension:
    extensions.append(
        cpp_extension.CppExtension(
            "tab._C",
            sorted(glob("csrc/cpu/**/*.cpp", recursive=True)),
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            py_limited_api=True,
            extra_compile_args={"cxx": [*CXX, TORCH_TARGET]},
            extra_link_args=LINK,
        )
    )
if with_cuda and cpp_extension:
    extensions.append(
        cpp_extension.CUDAExtension(
            "tab._C_cuda",
            sorted(glob("csrc/cuda/**/*.cu", recursive=True)),
            depends=sorted(glob("csrc/**/*.*h", recursive=True)),
            py_limited_api=True,
            extra_compile_args={"cxx": [*CXX, TORCH_TARGET], "nvcc": NVCC},
            extra_link_args=["-s"] if LINUX else [],
        )
    )

if insisted := [name for name in left_out if os.environ.get(how(name)) == "1"]:
    raise SystemExit(f"{insisted[0]}: {left_out[insisted[0]]}")
if not extensions:
    Path("tab/left_out.json").unlink(missing_ok=True)

# A framed warning that pip shows to everyone; it is about folders beside an editable install.
warnings.filterwarnings("ignore", "Editable installation")

setup(
    # Namespaces too, since the folders of recipes and of spaces hold data alone.
    packages=[
        *find_namespace_packages(include=["tab", "tab.*"], exclude=["tab.kernels*"]),
        "tab.kernels",
    ],
    package_dir={"tab.kernels": "kernels"},
    package_data={
        "tab": ["py.typed", "recipe/published.csv", "drawing/*.css", "drawing/*.js"],
        "tab.recipe.recipes": ["*.toml"],
        "tab.sweep.spaces": ["*.toml"],
    },
    ext_modules=extensions,
    cmdclass={"build_ext": BuildWhatCompiles},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if extensions else {},
)
