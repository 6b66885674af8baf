"""The build's switches, and imports that must refuse."""

import json
import os
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from forks import python
from paths import ROOT

SWITCHES = ("TAB_CPP", "TAB_CUDA", "FORCE_CUDA")  # CI sets some for its own build
WITHOUT_SWITCHES = {name: value for name, value in os.environ.items() if name not in SWITCHES}
NO_TOOLKIT = "import pathlib; pathlib.Path.is_file = lambda self: False; "


def run(code: str, folder: Path = ROOT, **environment: str) -> CompletedProcess[str]:
    return python("-c", code, folder=folder, environment={**WITHOUT_SWITCHES, **environment})


def setup(before: str = "", **environment: str) -> CompletedProcess[str]:
    code = f"{before}import sys; sys.argv = ['setup.py', '--name']; exec(open('setup.py').read())"
    return run(code, **environment)


def test_tab_cuda_1_without_a_toolkit_fails_and_says_what_to_do():
    done = setup(NO_TOOLKIT, TAB_CUDA="1")
    assert done.returncode and "no CUDA toolkit" in done.stderr and "TAB_CUDA=0" in done.stderr


def test_auto_without_a_toolkit_leaves_cuda_out():
    done = setup(NO_TOOLKIT + "import atexit; atexit.register(lambda: print(with_cuda)); ")
    assert done.returncode == 0 and done.stdout.split()[-1] == "False", done.stderr


@pytest.mark.parametrize(
    "gpu, force, wanted", [("", "0", "False"), ("", "1", "True"), ("GPU 0: one", "0", "True")]
)
def test_auto_takes_a_gpu_and_a_toolkit(gpu, force, wanted, tmp_path):
    """The toolkit alone cost a newcomer without a GPU most of the first minutes."""
    (tmp_path / "include").mkdir()
    (tmp_path / "include/cuda_runtime.h").touch()
    asked = tmp_path / "nvidia-smi"
    asked.write_text(f"#!/bin/sh\necho '{gpu}'\n")
    asked.chmod(0o755)
    done = setup(
        "import atexit; atexit.register(lambda: print(with_cuda)); ",
        CUDA_HOME=str(tmp_path),
        FORCE_CUDA=force,
        TAB_CUDA="auto",
        PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    )
    assert done.returncode == 0 and done.stdout.split()[-1] == wanted, done.stderr


@pytest.mark.parametrize("name", ["TAB_CPP", "TAB_CUDA"])
def test_another_value_is_refused(name):
    done = setup(**{name: "yes"})
    assert done.returncode and f"{name}=yes is none of auto, 0, 1" in done.stderr


def build(folder: Path, **environment: str) -> CompletedProcess[str]:
    """Of a copy of the sources, as pip builds a wheel."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "kernels", "tab"):
        skipped = shutil.ignore_patterns("*.so", "kernels", "__pycache__", "left_out.json")
        shutil.copytree(ROOT / name, folder / name, ignore=skipped if name == "tab" else None)
    return run(
        "import sys; sys.argv = ['setup.py', 'build']; exec(open('setup.py').read())",
        folder,
        **environment,
    )


BROKEN = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++", "TAB_CUDA": "0"}


def test_without_a_compiler_the_rest_is_built_and_says_why(tmp_path):
    folder = tmp_path / "a path with spaces"
    folder.mkdir()
    done = build(folder, **BROKEN)
    assert done.returncode == 0, done.stderr
    for name in ("tab._C", "tab._host"):
        assert f"{name} is left out" in done.stderr
    assert "/nowhere/c++" in done.stderr and "TAB_CPP=1" in done.stderr
    (built,) = folder.glob("build/lib*/tab")
    said = json.loads((built / "left_out.json").read_text())
    assert "/nowhere/c++" in said["tab._C"] and "TAB_CPP=1" in said["tab._host"]
    code = "from tab.doctor import doctor; print(doctor.built('_C'))"
    told = run(code, built.parent, PYTHONPATH=str(built.parent))
    assert "not built: " in told.stdout and "/nowhere/c++" in told.stdout, told.stderr


def test_tab_cpp_1_insists(tmp_path):
    done = build(tmp_path, **BROKEN, TAB_CPP="1")
    assert done.returncode and "is left out" not in done.stderr


def test_a_broken_nvcc_costs_only_the_cuda_kernels(tmp_path):
    home = tmp_path / "cuda"
    (home / "include").mkdir(parents=True)
    (home / "include/cuda_runtime.h").touch()
    (home / "bin").mkdir()
    (home / "bin/nvcc").write_text("#!/bin/sh\necho 'error: no licence' >&2; exit 1\n")
    (home / "bin/nvcc").chmod(0o755)
    folder = tmp_path / "tree"
    folder.mkdir()
    done = build(folder, CUDA_HOME=str(home), FORCE_CUDA="1", TAB_CUDA="auto", TAB_CPP="0")
    assert done.returncode == 0 and "tab._C_cuda is left out" in done.stderr, done.stderr


def test_a_clone_on_the_path_hides_no_package_of_the_name_kernels(tmp_path):
    """The hub's package of that name is found, wherever it lies; where there is none, transformers
    takes a folder without __file__ and __version__ for none, and imports."""
    look = "import kernels; print(kernels.__file__, getattr(kernels, '__version__', None))"
    done = run(look)
    assert done.stdout.split() == ["None", "None"], done.stderr
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.9'\n")
    done = run(look, PYTHONPATH=str(tmp_path))
    assert done.stdout.split() == [str(tmp_path / "kernels" / "__init__.py"), "0.9"], done.stderr


def test_unknown_default_backend_is_refused():
    done = run("import tab.ops", TAB_BACKEND="fast")
    assert done.returncode and "TAB_BACKEND='fast' is none of auto, reference" in done.stderr
