"""Files of results that are damaged, foreign, or of a later TAB: each ends in one line with the
file's name and the way out, or is survived where nothing is lost by it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tab.bench.results import environment, save
from tab.bench.rows import Row
from tab.cli.main import app
from tab.compare.driver import Watcher, compare
from tab.compare.plan import Grid, Plan
from tab.compare.runs import read_runs
from tab.data.load import load_dataset
from tab.recipe.recipe import load_recipe
from tab.train.loop import train

DATA = "shapes:100/20"
TINY = {
    **{"train.epochs": 2, "train.batch_size": 20, "data.images": 60, "data.validation": 20},
    **{"model.mlp.hidden": 8, "model.mlp.tokens": 4, "attention.linear.num_heads": 2},
}
DONE, STOPPED = "runs/mlp-none-s0", "runs/mlp-linear-s0"
REPORT, RESUME = ("report", "{out}"), ("compare", "--resume", "{out}")
ROBUSTNESS = ("robustness", "{out}", "--images", "4")
BENCH = ("bench", "compare", "{out}/bench.json", "{out}/other.json")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run that is done, and one that was stopped after an epoch; and a result of tab bench."""

    class Stop(Watcher):
        def epoch(self, config, row):
            if config.attention == "linear":
                raise KeyboardInterrupt

    out = tmp_path_factory.mktemp("whole")
    dataset = load_dataset(DATA)
    plan = Plan(
        load_recipe("quick", TINY), Grid("quick", ["mlp"], ["none", "linear"], 1, DATA, "cpu")
    )
    plan.save(out, dataset)
    with pytest.raises(KeyboardInterrupt):
        compare(plan, dataset, out, watcher=Stop())
    assert [run.status for run in read_runs(out, plan.grid)] == ["done", "running"]
    for name in ("bench.json", "other.json"):
        row = Row("case", "tab", error=0.0, seconds={"forward": [0.5, 0.6, 0.5]})
        save(out / name, [row], None, environment("cpu"), "tab bench")
    assert tab(*ROBUSTNESS, out=out).exit_code == 0
    assert tab(*REPORT, out=out).exit_code == 0
    return out


@pytest.fixture
def out(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def tab(*words: str, out: Path):
    return CliRunner().invoke(app, [word.format(out=out) for word in words])


def one_line(said, path: Path, way_out: str = "") -> None:
    """It ended with a line that names the file, and says what to do."""
    assert isinstance(said.exception, SystemExit) and said.exit_code == 2, said.output
    lines = [
        line for line in said.stderr.splitlines() if not line.startswith("The machine is busy")
    ]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert str(path) in said.stderr and "Traceback" not in said.stderr
    ways = ("put a copy back", "remove ", "measure again", "start a new", "give a result", "mend")
    assert any(way in said.stderr for way in ways), said.stderr
    assert way_out in said.stderr


# --- any file, any damage -------------------------------------------------------------------------

FILES = {  # where, what reads it, a key without which it is nothing, a later version is known
    "config.toml": (REPORT, "grid", True),
    "environment.json": (REPORT, "dataset", True),
    f"{DONE}/run.json": (REPORT, "status", True),
    f"{STOPPED}/run.json": (RESUME, "config", True),
    f"{DONE}/rows.jsonl": (REPORT, "epoch", False),
    f"{DONE}/robustness.json": (REPORT, "noise", True),
    f"{DONE}/model.safetensors": (ROBUSTNESS, None, False),
    f"{DONE}/test.npz": (REPORT, None, False),
    "bench.json": (BENCH, "rows", True),
}
DAMAGE = ["empty", "truncated", "garbage", "not_utf8", "list", "type", "key", "later", "directory"]
DAMAGE += ["unreadable"]


def damage(path: Path, how: str, key: str | None, monkeypatch) -> bool:
    """Damages it so, if that can be done to such a file."""
    raw = path.read_bytes()
    half = raw[: len(raw) // 2]
    plain = {
        "empty": b"",
        "truncated": half,
        "garbage": bytes(range(256)) * 3,
        "not_utf8": half + b"\xff" + raw[len(half) :],
        "list": b"[1, 2]\n",
    }
    if how in plain:
        path.write_bytes(plain[how])
    elif how == "directory":
        path.unlink()
        path.mkdir()
    elif key is None:
        return False
    elif how == "unreadable":  # a test may run as root, whom no mode keeps out
        read = Path.read_bytes

        def refuse(self):
            if self == path:
                raise PermissionError(13, "Permission denied", str(self))
            return read(self)

        monkeypatch.setattr(Path, "read_bytes", refuse)
    elif path.suffix == ".toml":
        text = raw.decode()
        change = {
            "later": text.replace("format = 1", "format = 2"),
            "type": text.replace("seeds = 1", 'seeds = "one"'),
            "key": text.replace("seeds = 1\n", ""),
        }
        path.write_text(change[how])
    else:
        first, *rest = raw.decode().splitlines() if path.suffix == ".jsonl" else (raw.decode(),)
        found = json.loads(first)
        assert key in found
        if how == "later":
            if "format" not in found:
                return False
            found["format"] = 2
        else:
            found[key] = 3.5
            if how == "key":
                del found[key]
        path.write_text("\n".join([json.dumps(found), *rest]) + "\n")
    assert how == "unreadable" or path.is_dir() or path.read_bytes() != raw
    return True


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_with_the_way_out(file, how, out, monkeypatch):
    command, key, versions = FILES[file]
    if not damage(out / file, how, key, monkeypatch):
        return
    said = tab(*command, out=out)
    if file.endswith("robustness.json") and how == "key":
        assert said.exit_code == 0, said.output  # the noise is measured again
        return
    one_line(said, out / file)
    if how == "later" and versions:
        assert "a later TAB (format 2; this one reads 1): update TAB" in said.stderr


@pytest.mark.parametrize("command", [REPORT, RESUME, ROBUSTNESS])
@pytest.mark.parametrize("file", [f for f, (reads, *_) in FILES.items() if reads in (REPORT,)])
def test_each_command_says_the_same(file, command, out):
    if command == ROBUSTNESS and file in ("environment.json", f"{DONE}/test.npz"):
        return  # not read
    (out / file).write_bytes(b"\x89TAB\xff")
    one_line(tab(*command, out=out), out / file)


# --- what is foreign ------------------------------------------------------------------------------


def test_a_run_of_another_name_is_not_taken_for_this_one(out):
    shutil.rmtree(out / STOPPED)
    shutil.copytree(out / DONE, out / STOPPED)
    for command in (REPORT, RESUME):
        one_line(tab(*command, out=out), out / STOPPED / "run.json", "it is of mlp-none-s0")


def test_a_models_file_of_another_run_is_not_taken_for_this_ones(out):
    other = load_recipe("quick", {**TINY, "model.mlp.hidden": 12}).run_config("mlp", "none", 0)
    train(other, load_dataset(DATA), out.parent / "other")
    shutil.copy(out.parent / "other" / "model.safetensors", out / DONE)
    (out / DONE / "robustness.json").unlink()
    one_line(tab(*REPORT, out=out), out / DONE / "model.safetensors", "it is of another run")


@pytest.mark.parametrize("what", ["tensor", "other"])
def test_a_foreign_checkpoint_is_no_beginning(what, out):
    path = out / STOPPED / "checkpoint.pt"
    torch.save(torch.zeros(3) if what == "tensor" else {"model": {}}, path)
    with pytest.warns(UserWarning, match="starts again from its first epoch"):
        said = tab(*RESUME, out=out)
    assert said.exit_code == 0, said.output


# --- what is survived -----------------------------------------------------------------------------


def test_half_a_row_of_a_stopped_run_is_survived(out):
    rows = out / STOPPED / "rows.jsonl"
    with rows.open("ab") as file:
        file.write(b'{"epoch": 2, "train_lo')
    assert tab(*REPORT, out=out).exit_code == 0
    assert tab(*RESUME, out=out).exit_code == 0
    assert [json.loads(line)["epoch"] for line in rows.read_text().splitlines()] == [1, 2]


def test_half_a_row_of_a_finished_run_is_not(out):
    """Its curve would end an epoch early, without a word."""
    rows = out / DONE / "rows.jsonl"
    rows.write_bytes(rows.read_bytes()[:-9])
    said = tab(*REPORT, out=out)
    one_line(said, rows, "has 1 of 2 epochs")


def test_other_files_are_survived(out):
    (out / STOPPED / "error.txt").write_bytes(b"caf\xe9 [/b]\n")
    (out / "lock").write_bytes(b"\xff\xfe")
    (out / "experiment_results.csv").write_bytes(b"\xff")
    (out / "report.md").unlink()
    said = tab(*REPORT, out=out)
    assert said.exit_code == 0, said.output
    assert tab(*RESUME, out=out).exit_code == 0
