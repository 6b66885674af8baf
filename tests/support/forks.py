"""Python in processes that find PyTorch loaded: forks of one that has what TAB needs, but not TAB.

To load it takes a process seconds. What a test claims of one (output, exit code, what TAB loads,
reads from the environment or does once) holds of a fork, too; who claims something of the start
itself takes subprocess.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

from patience import PATIENCE

LOADED = (
    *("numpy", "torch", "scipy.stats", "matplotlib.figure", "PIL.Image"),
    *("typer", "rich.console", "rich.table", "rich.progress", "safetensors.torch", "filelock"),
)


def python(
    *words: object,
    folder: Path | None = None,
    environment: dict[str, str] | None = None,
    timeout: int = PATIENCE,
) -> subprocess.CompletedProcess[str]:
    """What `python WORDS` prints, and its exit code, below 0 for a signal: as of subprocess.run.
    WORDS: -W ignore, then -c PROGRAM, -m MODULE or a file, and its arguments."""
    with tempfile.TemporaryDirectory() as place:
        asked = {
            "words": list(map(str, words)),
            "folder": str(folder or Path.cwd()),
            "environment": dict(os.environ if environment is None else environment),
            "streams": [os.devnull, f"{place}/out", f"{place}/err"],
            "timeout": timeout,
        }
        server = _server()
        print(json.dumps(asked), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        said = (Path(place, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(asked["words"], code, *said)


@functools.cache
def _server() -> subprocess.Popen:
    """One for all tests of this process."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, __file__], **pipes)

    @atexit.register
    def end() -> None:
        server.communicate()

    return server


def serve() -> list[str]:
    """A line of the input is a run, which a fork of this process becomes: there, its words are
    returned. The exit code is the line that answers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in LOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    gc.freeze()  # what the forks have in common stays theirs
    for line in sys.stdin:
        asked = json.loads(line)
        if not (process := os.fork()):
            return become(**asked)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    os._exit(0)


def become(
    words: list[str], folder: str, environment: dict[str, str], streams: list[str], timeout: int
) -> list[str]:
    """Makes this process what was asked for, up to the words that say what it runs."""
    import torch

    signal.alarm(timeout)  # which ends it
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = os.fdopen(0)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    while words[0] == "-W":
        warnings.simplefilter(words[1])
        words = words[2:]
    # Of a script its folder, else the one where it runs; then the variable's.
    first = "" if words[0] in ("-c", "-m") else str(Path(words[0]).parent)
    first = [] if environment.get("PYTHONSAFEPATH") else [first]
    named = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    here = str(Path(__file__).parent)
    sys.path[:] = dict.fromkeys([*first, *named, *(p for p in sys.path if p != here)])
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()
    return words


@contextlib.contextmanager
def brief_end() -> Iterator[None]:
    """Ends this process as Python does, but leaves PyTorch whole: to take it apart takes longer
    than many a test. What is raised, other than to exit, is left to Python."""
    code = 0
    try:
        yield
    except SystemExit as asked:
        if not isinstance(asked.code, int | None):
            raise
        code = asked.code or 0
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    words = serve()
    with brief_end():
        match words:
            case ["-c", program, *rest]:
                sys.argv = ["-c", *rest]
                sys.modules["__main__"] = types.ModuleType("__main__")
                exec(program, vars(sys.modules["__main__"]))
            case ["-m", module, *rest]:
                sys.argv = [module, *rest]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case [file, *rest]:
                sys.argv = [file, *rest]
                runpy.run_path(file, run_name="__main__")
