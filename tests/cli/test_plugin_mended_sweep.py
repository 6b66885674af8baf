"""A sweep, and a comparison that tunes first, with a plugin that was mended: what failed is tried
again, what the plugin trained before has to go first, and other mechanisms keep what they have."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from small_cli import SMALL, flat, tab
from small_plugin import MENDED

pytest.importorskip("optuna")

from tab import plugins
from tab.sweep.trials import read_trials

SEARCH = ("--space", "small", "--configurations", "2", "--epochs", "1,2", "--images", "60")
OPTIONS = [word for word in SMALL if word not in ("--epochs", "1")]


pytestmark = pytest.mark.usefixtures("forgotten")


def swept(mine: Path, out: Path, *more: object):
    words = ("--models", "mlp", "--attentions", "none,mine", "--plugin", mine, "--out", out)
    return tab("sweep", *words, *OPTIONS, *SEARCH, "--validation", "20", *more)


def statuses(out: Path, attention: str) -> list[tuple[int, int, str]]:
    return [(t.configuration, t.rung, t.status) for t in read_trials(out)[("mlp", attention)]]


def plugin_in(file: Path) -> dict[str, str]:
    table = tomllib.loads(file.read_text())
    (found,) = table.get("grid", table)["plugins"]
    return found


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_what_failed_in_a_sweep_is_tried_again(mine, tmp_path, sampler):
    out = tmp_path / "out"
    result = swept(mine, out, "--sampler", sampler)
    assert result.exit_code == 1 and "nothing could be scored for mlp-mine" in flat(result.stderr)
    assert statuses(out, "mine") == [(0, 0, "failed"), (1, 0, "failed")]
    control = {path: path.stat().st_mtime_ns for path in out.glob("runs/mlp-none-*/rows.jsonl")}
    drawn = [t.params for t in read_trials(out)[("mlp", "mine")]]
    mine.write_text(MENDED)
    assert tab("sweep", "show", out).exit_code == 0 and plugin_in(out / "sweep.toml") != (
        plugins.find(str(mine)).record()
    )  # it only looks
    result = tab("sweep", "--resume", out)
    assert result.exit_code == 0, result.output
    assert flat(result.stderr).count(f"{mine} has changed; nothing was trained with what it") == 1
    found = statuses(out, "mine")
    assert found[0] == (0, 0, "done") and len(found) == 3 and found[-1][1:] != (1, "failed")
    if sampler == "random":
        assert [t.params for t in read_trials(out)[("mlp", "mine")] if t.rung == 0] == drawn
    assert plugin_in(out / "sweep.toml") == plugins.find(str(mine)).record()
    assert not [*out.rglob("error.txt")]
    assert control == {path: path.stat().st_mtime_ns for path in control}
    before = (out / "trials.csv").read_bytes()
    again = tab("sweep", "--resume", out)
    assert again.exit_code == 0 and "has changed" not in again.output
    assert (out / "trials.csv").read_bytes() == before


def test_what_a_sweep_trained_has_to_be_removed(mine, tmp_path):
    out = tmp_path / "out"
    mine.write_text(MENDED)
    assert swept(mine, out).exit_code == 0
    mine.write_text(MENDED.replace("self.proj(x)", "self.proj(x).tanh()"))
    for words in (("sweep", "--resume", out), ("sweep", "show", out)):
        result = tab(*words)
        assert result.exit_code == 2 and f"{mine} has changed since" in flat(result.stderr)
        assert f"it is trained anew: {out / 'runs/mlp-mine-c000'}" in flat(result.stderr)
    for run in out.glob("runs/mlp-mine-*"):
        shutil.rmtree(run)
    result = tab("sweep", "--resume", out)
    assert result.exit_code == 0 and "has changed; nothing" in flat(result.stderr), result.output
    for run in out.glob("runs/mlp-mine-*"):
        assert json.loads((run / "run.json").read_text())["plugin"] == plugin_in(out / "sweep.toml")
    assert len(statuses(out, "mine")) == 3


def test_a_plugin_of_a_sweep_that_moved_changes_no_result(mine, tmp_path):
    out = tmp_path / "out"
    mine.write_text(MENDED)
    assert swept(mine, out).exit_code == 0
    before = (out / "trials.csv").read_bytes()
    moved = mine.rename(tmp_path / "elsewhere.py")
    assert tab("sweep", "--resume", out, "--plugin", moved).exit_code == 0
    assert plugin_in(out / "sweep.toml")["name"] == str(moved)
    assert (out / "trials.csv").read_bytes() == before


def test_a_comparison_that_tunes_goes_on(mine, tmp_path):
    out = tmp_path / "out"
    words = ("--models", "mlp", "--attentions", "none,mine", "--plugin", mine, "--out", out)
    result = tab("compare", *words, *SMALL, "--tune", "2")
    assert result.exit_code == 2 and "tuning scored no configuration of mlp-mine" in flat(
        result.stderr
    )
    mine.write_text(MENDED)
    result = tab("compare", "--resume", out)
    assert result.exit_code == 0, result.output
    assert flat(result.stderr).count(f"{mine} has changed; nothing was trained with what it") == 1
    now = plugins.find(str(mine)).record()
    assert plugin_in(out / "config.toml") == plugin_in(out / "tuning/sweep.toml") == now
    assert json.loads((out / "runs/mlp-mine-s0/run.json").read_text())["plugin"] == now


def test_from_python_a_sweep_goes_on_within_one_process(mine, tmp_path):
    import tab as library

    few = {"data.images": 60, "data.validation": 20, "train.batch_size": 20}
    given = {"recipe": "quick", "data": "shapes:100/20", "overrides": few, "space": "tuning"}
    found = library.sweep(
        ["mine"], "mlp", out=tmp_path / "out", tell=None, plugins=[mine], configurations=1,
        epochs=(1,), images=60, validation=20, **given,
    )  # fmt: skip
    assert [row["failed"] for row in found.rows()] == [1]
    mine.write_text(MENDED)
    lines = []
    found = library.load_study(tmp_path / "out").resume(tell=lines.append)
    assert [row["failed"] for row in found.rows()] == [0]
    assert f"{mine} has changed; nothing was trained with what it was" in lines
