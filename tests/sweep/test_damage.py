"""A sweep's files that are damaged, or of a later TAB: one line, with the name and the way out."""

import shutil

import pytest

pytest.importorskip("optuna")

from small_sweep import begin, tab_sweep

from tab.data.load import load_dataset
from tab.sweep.driver import sweep
from tab.sweep.plan import SweepPlan

FILES = ("sweep.toml", "recipe.toml", "space.toml", "environment.json", "study.journal")
RESUME, SHOW = ("--resume",), ("show",)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    dataset = load_dataset("shapes:100/20")
    out = begin(tmp_path_factory.mktemp("whole"), dataset, attentions=["self"])
    sweep(SweepPlan.load(out), dataset, out)
    return out


@pytest.mark.parametrize("command", [RESUME, SHOW])
@pytest.mark.parametrize("how", ["garbage", "truncated", "later", "directory"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_with_the_way_out(file, how, command, whole, tmp_path):
    if command == SHOW and file == "environment.json":
        return  # not read
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    path = out / file
    raw = path.read_bytes()
    if how == "directory":
        path.unlink()
        path.mkdir()
    elif how == "later":
        changed = raw.replace(b"format = 1", b"format = 2").replace(b'"format": 1', b'"format": 2')
        if changed == raw:
            return  # Optuna's own file
        path.write_bytes(changed)
    elif how == "truncated" and file == "study.journal":
        return  # half a line at the end is survived: test_faults.py
    else:
        path.write_bytes(bytes(range(256)) if how == "garbage" else raw[: len(raw) * 2 // 3])
    said = tab_sweep(*command, out)
    assert isinstance(said.exception, SystemExit) and said.exit_code == 2, said.output
    assert said.stderr.count("\n") == 1 and str(path) in said.stderr, said.stderr
    ways = ("put a copy back", "mend", "start a new", "resume", "give another")
    assert any(way in said.stderr for way in ways), said.stderr
