"""Every way to install TAB, each in a virtual environment of its own: `make installs`.

A way ends with `tab doctor`, which must say what was built and why the rest was not, and with one
op, which must be right in what was built. Nothing is downloaded but the build requirements of the
isolated build (1 MB): PyTorch and its like are links to those of the Python that runs this, and
each file is compiled once per compiler where ccache is installed.

Not collected by pytest; it runs alone:  python tests/support/installs.py [WAY ...]
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from paths import ROOT

BUILD = ("setuptools", "wheel", "pybind11", "ninja")
TESTS = ("pytest", "hypothesis", "expecttest")
SWITCHES = ("TAB_CPP", "TAB_CUDA", "FORCE_CUDA", "CC", "CXX", "PYTHONPATH")  # CI sets some
PACKAGE = "transformer-attention-bench"
# Bidirectional linear attention in float64 is the truth; `backend` is the one that must have run.
OP = """
import sys, torch, tab
q, k, v = torch.randn(3, 2, 2, 70, 24, generator=torch.Generator().manual_seed(0))
f, g = (torch.nn.functional.elu(x.double()) + 1 for x in (q, k))
weights = f @ g.mT
truth = weights @ v.double() / weights.sum(-1, keepdim=True)
error = (tab.linear_attention(q, k, v, eps=0.0, backend=sys.argv[1]) - truth).abs().max().item()
assert error < 1e-5, error
"""


@dataclass
class Place:
    """The folder of one way: its sources, its environment, its temporary files."""

    folder: Path
    sdist: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        return self.folder / "venv/bin/python"

    @property
    def shared(self) -> Path:
        """PyTorch and what it needs, and nothing else."""
        return self.folder / "shared"

    @property
    def site(self) -> Path:
        return next((self.folder / "venv/lib").glob("python*/site-packages"))

    def prepare(self) -> None:
        temporary = self.folder / "tmp"
        temporary.mkdir(parents=True)
        venv.create(self.folder / "venv", symlinks=True)
        torch = ["torch", *requirements("torch", without=BUILD)]
        share(self.shared, torch)
        others = [*BUILD, *TESTS, *requirements(PACKAGE, *BUILD, *TESTS, without=torch)]
        share(self.folder / "others", others)
        paths = f"{self.shared}\n{self.folder / 'others'}\n"
        (self.site / "shared.pth").write_text(paths, encoding="utf-8")
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in SWITCHES and k[:4] != "PIP_"},
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "TMPDIR": str(temporary),
            # What is compiled in one folder is found again in the others.
            "CCACHE_BASEDIR": str(self.folder.parent),
            "CCACHE_NOHASHDIR": "1",
            "MAX_JOBS": os.environ.get("MAX_JOBS", "2"),
        }

    def run(self, *words: object) -> str:
        done = subprocess.run(
            list(map(str, words)),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout}"
        return done.stdout

    def pip(self, *words: object) -> str:
        return self.run(sys.executable, "-m", "pip", "--python", self.python, *words)

    def install(self, *words: object) -> None:
        """Without isolation: the build finds the torch that the environment has."""
        said = self.pip("install", "--no-build-isolation", *words)
        warned = re.search(r".*Warning: .*", said)
        assert warned is None, f"a newcomer is shown: {warned[0]}"

    def unpacked(self) -> Path:
        with tarfile.open(self.sdist) as archive:
            archive.extractall(self.folder / "tmp", filter="data")
        return next((self.folder / "tmp").glob("transformer_attention_bench-*"))

    def check(self, cpu: str = "built", cuda: str = "not built", backend: str = "cpp") -> None:
        said = self.run(self.folder / "venv/bin/tab", "doctor", "--json")
        found, _ = json.JSONDecoder().raw_decode(said[said.index("{\n") :])  # warnings come before
        for name, pattern in (("_C", cpu), ("_host", cpu), ("_C_cuda", cuda)):
            state = found["versions"][f"tab.{name}"].partition(": ")[2]
            assert re.fullmatch(pattern, state), f"tab.{name}: {state!r}, and not {pattern!r}"
        self.run(self.python, "-P", "-c", OP, backend)


# --- what is shared -------------------------------------------------------------------------------


def requirements(*names: str, without: Iterable[str] = ()) -> list[str]:
    """The distributions that these need, and what those need, and so on."""
    found: dict[str, None] = {}
    waiting = [one for name in names for one in needed(Requirement(name))]
    seen = set()
    while waiting:
        one = waiting.pop()
        if str(one) not in seen and one.name not in without:
            seen.add(str(one))
            found[one.name] = None
            waiting += needed(one)
    return list(found)


def needed(by: Requirement) -> list[Requirement]:
    every = [Requirement(line) for line in distribution(by.name).requires or ()]
    for_any = [{"extra": extra} for extra in by.extras or {""}]
    return [r for r in every if r.marker is None or any(map(r.marker.evaluate, for_any))]


def share(folder: Path, names: Iterable[str]) -> None:
    """Links to the installed distributions, which a line of a .pth file then makes importable."""
    folder.mkdir()
    for name in names:
        one = distribution(name)
        for top in {path.parts[0] for path in one.files or () if path.parts[0] != ".."}:
            link = folder / top
            if top != "__pycache__" and not link.is_symlink():
                link.symlink_to(one.locate_file(top))


def stand_in(folder: Path, shared: Path) -> None:
    """A wheel called torch that makes the shared one importable: an isolated build installs it."""
    version = distribution("torch").version
    info = f"torch-{version}.dist-info"
    files = {
        "shared.pth": f"{shared}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
        wheel.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in files))


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


# --- the ways -------------------------------------------------------------------------------------


def wheel(place: Place) -> None:
    """sdist → wheel → an environment that has never seen the sources."""
    place.environment["TAB_CPP"] = "1"
    place.pip("wheel", "--no-build-isolation", "--no-deps", "-w", "dist", place.sdist)
    (made,) = place.folder.glob("dist/*.whl")
    assert "-cp311-abi3-" in made.name, made.name
    assert made.stat().st_size < 3 << 20, f"{made.name}: {made.stat().st_size} bytes"
    place.pip("install", made)
    place.check()


def editable(place: Place) -> None:
    place.install("--editable", place.unpacked())
    place.check()


def path_with_spaces(place: Place) -> None:
    place.install("--editable", place.unpacked())
    place.check()


def isolated(place: Place) -> None:
    """As `pip install` builds by default, in an environment that only the build has."""
    wheels = place.folder / "wheels"
    wheels.mkdir()
    pins = [f"{name}=={distribution(name).version}" for name in BUILD if name != "wheel"]
    download = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", wheels)
    subprocess.run([*download, *pins], check=True)
    stand_in(wheels, place.shared)
    place.pip("install", "--find-links", wheels, place.sdist)
    place.check()


def no_compiler(place: Place) -> None:
    place.environment |= {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    place.install(place.sdist)
    place.check(r"not built: .*/nowhere/c\+\+.*; to insist: TAB_CPP=1", backend="reference")


def no_openmp(place: Place) -> None:
    """As Apple's compiler, which refuses the option."""
    refuse = 'case " $* " in *" -fopenmp"*|*" -lgomp"*) echo "no OpenMP" >&2; exit 1;; esac'
    cached = "ccache " if shutil.which("ccache") else ""
    place.environment["TORCH_NO_COMPILER_WRAPPER"] = "1"  # this one calls ccache itself
    for variable, name in (("CC", "cc"), ("CXX", "c++")):
        call = f'{refuse}\nexec {cached}{shutil.which(name)} "$@"'
        place.environment[variable] = str(script(place.folder / f"bin/{name}", call))
    place.install(place.sdist)
    place.check()


def broken_nvcc(place: Place) -> None:
    home = place.folder / "cuda"
    script(home / "bin/nvcc", "echo 'error: no licence' >&2; exit 1")
    (home / "include").mkdir()
    (home / "include/cuda_runtime.h").touch()
    place.environment |= {"CUDA_HOME": str(home), "FORCE_CUDA": "1"}
    place.install(place.sdist)
    place.check(cuda="not built: .*no licence.*; to insist: TAB_CUDA=1")


def clang(place: Place) -> None:
    """All CPU files; tests of the vectors and of each kernel run in each instruction set."""
    place.environment |= {"CC": "clang", "CXX": "clang++", "TAB_CPP": "1", "OMP_NUM_THREADS": "1"}
    place.install(place.sdist)
    place.check()
    tests = [ROOT / f"tests/ops/test_{name}.py" for name in ("simd", "sanitized")]
    for isa in ("baseline", "avx2", ""):  # the last: the best of this machine
        place.environment["TAB_ISA"] = isa
        said = place.run(place.python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
        print(f"  TAB_ISA={isa}: {said.splitlines()[-1]}")


WAYS: dict[str, Callable[[Place], None]] = {
    way.__name__: way
    for way in (
        wheel, editable, path_with_spaces, isolated, no_compiler, no_openmp, broken_nvcc, clang,
    )
}  # fmt: skip


def main() -> None:
    wanted = sys.argv[1:] or list(WAYS)
    if unknown := set(wanted) - set(WAYS):
        raise SystemExit(f"unknown {', '.join(unknown)}; choose from {', '.join(WAYS)}")
    with tempfile.TemporaryDirectory() as temporary:
        code = "from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"
        subprocess.run(
            [sys.executable, "-c", code, temporary], cwd=ROOT, check=True, capture_output=True
        )
        (sdist,) = Path(temporary).glob("*.tar.gz")
        for name in wanted:
            start = time.perf_counter()
            place = Place(Path(temporary, name.replace("path_with_", "path with ")), sdist)
            place.prepare()
            WAYS[name](place)
            print(f"{name}: right, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
