"""Takes the barriers out of csrc/cuda one by one: the tests on the CPU must notice each.

    python tests/support/without_barriers.py [PART OF A FILE NAME …]

Prints a line for each barrier; exit code 1 where one was not missed. Ten seconds for each.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from paths import ROOT

BARRIER = re.compile(r"\b__sync(?:threads|warp)\(\)")


def noticed(source: Path, line: int) -> str:
    """What the tests say with that line's barrier gone; "" when nothing."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("tests", "csrc"):
            shutil.copytree(ROOT / part, copy / part)
        shutil.copy(ROOT / "pyproject.toml", copy)
        lines = source.read_text().splitlines()
        lines[line] = BARRIER.sub("(void)0", lines[line])
        (copy / source.relative_to(ROOT)).write_text("\n".join(lines))
        name = source.parent.name.replace("core", "*")  # all tests of what all share
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
             *sorted((copy / "tests/cuda").glob(f"test_{name}.py"))],
            cwd=copy, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        found = re.search(r"^E +\w*Error: (.*)", done.stdout, re.M)
        return "" if done.returncode == 0 else found[1] if found else done.stdout[-300:]


if __name__ == "__main__":
    missed = 0
    for source in sorted((ROOT / "csrc" / "cuda").glob("*/*")):
        if not any(part in source.name for part in sys.argv[1:] or [""]):
            continue
        for line, text in enumerate(source.read_text().splitlines()):
            if BARRIER.search(text.split("//")[0]):
                said = noticed(source, line)
                missed += not said
                print(f"{source.name}:{line + 1}: {said or 'NOT NOTICED'}", flush=True)
    sys.exit(missed > 0)
