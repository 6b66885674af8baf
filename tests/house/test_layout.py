"""Where tests lie: in a folder by what they test; what two of them share lies in support/."""

import ast
import re
from pathlib import Path

from paths import ROOT, SUPPORT

TESTS = SUPPORT.parent


def imported(path: Path) -> set[str]:
    """The first word of each module that a file imports; "" for a relative import."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names.add("" if node.level else node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names


def test_no_file_imports_from_a_test():
    for path in TESTS.rglob("*.py"):
        wrong = {name for name in imported(path) if name in ("", "tests", "conftest")}
        wrong |= {name for name in imported(path) if name.startswith("test_")}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}; share it in tests/support"


def test_every_test_lies_in_a_folder():
    files = {path.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    assert files and all(len(path.parts) == 2 for path in files)
    assert not [path for path in files if path.parts[0] in ("support", "fixtures")]


def test_what_compiles_gpu_kernels_is_run_by_make_kernels():
    """`make test` leaves such tests out: a file that the Makefile does not name runs nowhere."""
    words = re.search(r"^PTX := (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1]
    named = {path for word in words.split() for path in ROOT.glob(word)}
    marked = re.compile(r"mark\.compiles|@both_ways")
    found = {path for path in TESTS.rglob("test_*.py") if marked.search(path.read_text("utf-8"))}
    found -= {TESTS / "ops/test_triton.py", Path(__file__)}  # which has a line of its own
    assert named == found
