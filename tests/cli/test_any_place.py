"""Any directory, any name: nothing in a name is markup, and what was moved goes on."""

import datetime
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from patience import PATIENCE
from PIL import Image
from rich.table import Table
from typer.testing import CliRunner

from tab import files
from tab.cli.main import app
from tab.cli.terminal import plain
from tab.compare.plan import Grid
from tab.compare.runs import read_runs
from tab.layers import _registry, get_attention, register_attention

CLASSES = ("[red]x", "a[ b]", ":smile:", "$x$", "<b>&", "\x7f🎉")
MECHANISM = "[red]$x$ :ant: é"
PLACE = "[b]res 🎉 $x$ :ant:\x7f"
TINY = [
    *("--recipe", "quick", "--epochs", "1", "--device", "cpu"),
    *("--set", "data.validation=12", "--set", "train.batch_size=10"),
    *("--set", "model.mlp.hidden=8", "--set", "model.mlp.tokens=4"),
]

pytestmark = pytest.mark.usefixtures("one_thread")


def tab_(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def pictures(folder: Path, classes=CLASSES, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    for split, count in (("train", 8), ("test", 3)):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                noise = random.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """data, results and what was said, in a directory with such a name."""
    base = tmp_path_factory.mktemp("base") / PLACE
    data, out = pictures(base / "data [b] 🎉"), base / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TAB_DATA", str(base.parent / "cache"))
        patched.setattr(_registry, "_layers", dict(_registry._layers))
        register_attention(MECHANISM)(type("Mine", (get_attention("linear"),), {}))
        names = ("--models", "mlp", "--attentions", f"none,{MECHANISM}")
        said = tab_("compare", "--data", data, *names, *TINY, "--out", out)
        assert said.exit_code == 0, said.output
        yield base, said.output


@pytest.fixture
def base(compared, tmp_path):
    """A copy of it all, elsewhere: the old paths lead nowhere."""
    shutil.copytree(compared[0], tmp_path / PLACE)
    hidden = compared[0].with_name("hidden")
    compared[0].rename(hidden)
    yield tmp_path / PLACE
    hidden.rename(compared[0])


def test_names_are_printed_as_they_are(compared):
    base, said = compared
    assert f"Report: {base / 'out' / 'report.html'}" in said
    assert f"{base / 'out'}: 2 runs on " in said
    assert f"[2/2] mlp-{MECHANISM}-s0\n" in said and f"\n{MECHANISM} " in said
    listed = tab_("data", base / "data [b] 🎉")
    assert listed.exit_code == 0 and all(f" {name} " in listed.output for name in CLASSES[:-1])
    missing = tab_("report", base / "[/nothing]")
    assert missing.exit_code == 2 and str(base / "[/nothing]") in missing.stderr


def test_no_console_knows_markup():
    """In all of TAB a console is made in one place, and a bar's texts are told to be plain."""
    text = io.StringIO()
    console = plain(file=text, width=60)
    table = Table("[b]head[/b]", title="[i]title[/i] :ant:", caption="[/c]")
    table.add_row("[red]x[/] :smile:")
    console.print(table)
    console.print("[bold]y[/bold]", style="red")
    for word in ("[b]head[/b]", "[i]title[/i] :ant:", "[/c]", "[red]x[/] :smile:"):
        assert word in text.getvalue()
    assert "[bold]y[/bold]" in text.getvalue()
    for path in (ROOT / "tab").rglob("*.py"):
        source = path.read_text()
        assert path.name == "terminal.py" or "Console(" not in source, path
        for line in source.splitlines():
            assert "TextColumn(" not in line or "markup=False" in line or '("left")' in line, path


def test_results_and_data_that_were_moved_go_on(base):
    out, data = base / "out", base / "data [b] 🎉"
    for words in (("report",), ("compare", "--resume")):
        said = tab_(*words, out)
        assert said.exit_code == 2 and said.stderr.count("\n") == 1
        assert "the data is no longer at" in said.stderr and "--data" in said.stderr
    shutil.rmtree(out / "runs" / f"mlp-{MECHANISM}-s0")  # something is left to do
    (out / "experiment_summary.csv").unlink()
    said = tab_("compare", "--resume", out, "--data", data)
    assert said.exit_code == 0, said.output
    assert [run.status for run in read_runs(out, Grid.load(out))] == ["done", "done"]
    assert (out / "experiment_summary.csv").exists()
    moved = out.rename(base / "moved [red]")
    for words in (("compare", "--resume"), ("report",), ("robustness", "--images", "4")):
        said = tab_(*words[:1], *words[1:], moved)  # config.toml says where the data is now
        assert said.exit_code == 0, said.output


def test_other_data_is_refused_by_name(base):
    other = pictures(base / "other", seed=1)
    before = (base / "out" / "config.toml").read_bytes()
    for words in (("compare", "--resume"), ("report",), ("robustness",)):
        said = tab_(*words, base / "out", "--data", other)
        assert said.exit_code == 2 and said.stderr.count("\n") == 1, said.output
        facts = json.loads((base / "out" / "environment.json").read_text())
        assert facts["dataset"]["fingerprint"] in said.stderr and "folder:other (" in said.stderr
    assert (base / "out" / "config.toml").read_bytes() == before


def test_a_name_that_is_no_text_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = pictures(tmp_path / b"caf\xe9".decode("utf-8", "surrogateescape"))
    said = tab_("compare", "--data", data, "--models", "mlp", "--attentions", "none", *TINY)
    assert said.exit_code == 2 and said.stderr.count("\n") == 1
    assert r"caf\udce9" in said.stderr and "rename it" in said.stderr
    assert not (tmp_path / "results").exists()


THRICE = """
import sys, tab.cli.main
given = sys.argv[1:]
for more in ([], [], ["--resume"]):
    sys.argv = ["tab", *given, *more]
    try:
        tab.cli.main.main()
    except SystemExit as ended:
        for stream in (sys.stdout, sys.stderr):
            print("code", ended.code or 0, file=stream)
"""


def test_results_may_lie_where_the_name_is_no_text(tmp_path):
    """The system's own file names are bytes; a terminal shows what is none of its letters by code.
    In a process of its own, since there it is the real output that must not fail."""
    out = tmp_path / b"caf\xe9".decode("utf-8", "surrogateescape")
    words = ["train", "mlp", "none", "--data", "shapes:40/20", *TINY, "--out", out]
    command = [sys.executable, "-W", "ignore", "-c", THRICE, *map(str, words)]
    ran = subprocess.run(
        command, capture_output=True, timeout=PATIENCE, env={"PATH": "", "LC_ALL": "C"}
    )
    said, errors = (text.split(b"code ") for text in (ran.stdout, ran.stderr))
    assert [text[:1] for text in said[1:]] == [b"0", b"2", b"0"], ran.stderr
    assert all(b"caf\\udce9" in text for text in (said[0], errors[1], said[2]))
    assert b"Traceback" not in ran.stderr
    assert json.loads((out / "run.json").read_text())["status"] == "done"


class Stopped(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 2, 3, 4, 5)


def test_what_begins_in_one_second_gets_a_directory_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "datetime", Stopped)
    small = ("--data", "shapes:60/20", *TINY)
    for _ in range(2):
        for words in (
            ("compare", "--models", "mlp", "--attentions", "none"),
            ("train", "mlp", "none"),
        ):
            said = tab_(*words, *small)
            assert said.exit_code == 0, said.output
    stamp = "2026-01-02_03-04-05"
    assert {path.name for path in Path("results").iterdir()} == {stamp, f"{stamp}-2"}
    assert len(list(Path("results").glob("*/report.html"))) == 2
    one = f"{stamp}_mlp-none-s0"
    assert {path.name for path in Path("runs").iterdir()} == {one, f"{one}-2"}


def test_a_sweep_begun_in_the_same_second_and_with_moved_data(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAB_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "datetime", Stopped)
    data = pictures(tmp_path / "data", ("a", "b", "c"))
    words = ("--models", "mlp", "--attentions", "none", "--data", data, "--configurations", "2")
    words += ("--epochs", "1,2", "--images", "0", "--validation", "6", "--device", "cpu")
    small = [word for word in TINY if word not in ("--epochs", "1", "--device", "cpu")]
    for _ in range(2):
        said = tab_("sweep", *words, *small)
        assert said.exit_code == 0, said.output
    first, second = sorted(Path("results").iterdir())
    assert second.name == f"{first.name}-2"
    (first / "winners.toml").unlink()
    data.rename(tmp_path / "moved")
    said = tab_("sweep", "--resume", first)
    assert said.exit_code == 2 and "--data" in said.stderr
    said = tab_("sweep", "--resume", first, "--data", pictures(tmp_path / "other", ("a", "b")))
    assert said.exit_code == 2 and "not with folder:other" in said.stderr
    said = tab_("sweep", "--resume", first, "--data", tmp_path / "moved")
    assert said.exit_code == 0 and (first / "winners.toml").exists(), said.output
    assert tab_("sweep", "--resume", first.rename("elsewhere")).exit_code == 0


def test_train_resumes_only_what_is_there(tmp_path):
    words = ("train", "mlp", "none", "--data", "shapes:60/20", *TINY, "--resume", "--out")
    said = tab_(*words, tmp_path / "typo")
    assert said.exit_code == 2 and "holds no run to continue" in said.stderr
    assert not (tmp_path / "typo").exists()
