"""The build's switches, and imports that must refuse."""

import os
import subprocess
import sys

from paths import ROOT

NO_TOOLKIT = "import pathlib; pathlib.Path.is_file = lambda self: False; "


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def setup(before: str = "", **environment: str) -> subprocess.CompletedProcess:
    code = f"{before}import sys; sys.argv = ['setup.py', '--name']; exec(open('setup.py').read())"
    return run(code, **environment)


def test_tab_cuda_1_without_a_toolkit_fails_and_says_what_to_do():
    done = setup(NO_TOOLKIT, TAB_CUDA="1")
    assert done.returncode and "no CUDA toolkit" in done.stderr and "TAB_CUDA=0" in done.stderr


def test_auto_without_a_toolkit_leaves_cuda_out():
    done = setup(NO_TOOLKIT + "import atexit; atexit.register(lambda: print(with_cuda)); ")
    assert done.returncode == 0 and done.stdout.split()[-1] == "False", done.stderr


def test_another_value_is_refused():
    done = setup(TAB_CUDA="yes")
    assert done.returncode and "TAB_CUDA=yes is none of auto, 0, 1" in done.stderr


def test_kernels_refuses_its_bare_name():
    done = run("import kernels")
    assert done.returncode and "tab.kernels" in done.stderr


def test_unknown_default_backend_is_refused():
    done = run("import tab.ops", TAB_BACKEND="fast")
    assert done.returncode and "TAB_BACKEND='fast' is none of auto, reference" in done.stderr
