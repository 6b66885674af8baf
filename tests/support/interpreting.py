"""Files of interpreted/, each in a fork of one process in which Triton interprets.

What they import takes longer than many of them: torch, TAB, and what either loads when first used.
"""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from paths import SUPPORT
from patience import PATIENCE

LONGEST = 4 * PATIENCE  # seconds; then the fork is killed


@contextmanager
def interpreting(folder: Path) -> Iterator[Callable[[str], tuple[int, str]]]:
    """A function from the name of a file to pytest's exit code, below 0 for a signal, and all that
    it printed, which it writes in `folder`. Whether Triton interprets is settled when it is
    imported: hence another process."""
    command, pipe = [sys.executable, __file__], subprocess.PIPE
    # A script's folder is not on the path where that is to be safe (PYTHONSAFEPATH).
    path = os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, cwd=SUPPORT, env=environment
    ) as process:

        def run(name: str) -> tuple[int, str]:
            printed = folder / f"{name}.txt"
            print(name, printed, sep="\t", file=process.stdin, flush=True)
            said = process.stdout.readline()
            assert said, f"the process that interprets ended: exit code {process.wait()}"
            return int(said), printed.read_text()

        yield run
        process.stdin.close()


def serve() -> None:
    """A line of the input, NAME <tab> FILE, is a run; its exit code is the line that answers."""
    import interpreter  # noqa: F401
    import proof
    import pytest

    with proof.poisoned():  # loads a part of torch's compiler
        pass
    gc.freeze()  # what the forks have in common stays theirs
    for line in sys.stdin:
        name, printed = line.rstrip("\n").split("\t")
        if not (process := os.fork()):
            signal.alarm(LONGEST)
            file = os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", f"interpreted/{name}.py"])
            sys.stdout.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
