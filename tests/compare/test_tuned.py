"""A tuned comparison: the same draws for every row, winners trained anew, a report that says so."""

import itertools

import numpy as np
import pytest
from typer.testing import CliRunner

from tab.cli.main import app
from tab.compare.plan import Grid, Plan
from tab.compare.runs import read_runs
from tab.report.tuning import best_of
from tab.sweep.plan import SweepPlan
from tab.sweep.trials import read_trials, winner_of

TINY = [
    *("--recipe", "quick", "--data", "shapes:200/40", "--models", "mlp", "--device", "cpu"),
    *("--attentions", "none,self", "--epochs", "3", "--set", "data.validation=20"),
    *("--set", "train.batch_size=20", "--set", "model.mlp.hidden=8", "--set", "model.mlp.tokens=4"),
]
TUNED = ["--tune", "3", "--seeds", "2", "--control-seeds", "3"]

pytestmark = pytest.mark.usefixtures("one_thread")


def tab(*words) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        patched.setenv("TAB_DATA", str(folder.parent / "data"))
        tab("compare", *TINY, *TUNED, "--out", folder)
        yield folder


def test_every_row_meets_the_same_draws(out):
    trials = read_trials(out / "tuning")
    drawn = {
        pair: {t.configuration: t.params for t in mine if t.rung == 0}
        for pair, mine in trials.items()
    }
    first, second = drawn[("mlp", "none")], drawn[("mlp", "self")]
    assert first == second and len({params["lr"] for params in first.values()}) == 3


def test_every_draw_is_trained_to_the_end(out):
    """Where the rate is still high, low rates lead that are behind at the end."""
    plan = SweepPlan.load(out / "tuning")
    assert plan.budget.epochs == (Plan.load(out).config("mlp", "none", 0).train.epochs,)
    for mine in read_trials(out / "tuning").values():
        assert [(t.configuration, t.rung, t.epochs) for t in mine] == [(i, 0, 3) for i in range(3)]


def test_what_won_is_trained_from_other_seeds(out):
    trials, plan = read_trials(out / "tuning"), Plan.load(out)
    for attention in ("none", "self"):
        config = plan.config("mlp", attention, 0)
        chosen = winner_of(trials[("mlp", attention)]).params
        assert config.train.lr == pytest.approx(chosen["lr"])
        assert config.train.weight_decay == pytest.approx(chosen["weight_decay"])
    grid = Grid.load(out)
    cells = [("mlp", a, s) for s in (0, 1) for a in ("none", "self")] + [("mlp", "none", 2)]
    assert grid.cells() == cells and grid.tune == 3
    runs = read_runs(out, grid)
    assert [run.status for run in runs] == ["done"] * 5
    seeds = {int(path.name.rsplit("-s")[-1]) for path in (out / "runs").iterdir()}
    assert seeds == {0, 1, 2}
    (tuning,) = {run.seed for run in [plan.config("mlp", "none", 1_000_000)]}
    assert tuning not in seeds


def test_resumed_it_trains_nothing_twice(out):
    times = {path: path.stat().st_mtime_ns for path in out.rglob("rows.jsonl")}
    said = tab("compare", "--resume", out, "--tune", "3", "--recipe", "quick", *TINY[10:])
    assert {path: path.stat().st_mtime_ns for path in out.rglob("rows.jsonl")} == times, said
    assert "It will take" not in said  # neither the search, nor the runs
    other = CliRunner().invoke(app, ["compare", "--resume", str(out), "--tune", "4"])
    assert other.exit_code == 2 and "--tune: was 3, now 4" in other.output


def test_the_report_says_how_it_was_tuned(out):
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "**Tuned:** for each row the same 3 draws" in text and "Not tuned" not in text
    assert "## Tuning" in text and "| Best of 1 | Best of 2 | Best of 3 | Winner (%) |" in text


def test_without_it_the_report_says_so(tmp_path):
    tab("compare", *TINY, "--tune", "0", "--out", tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "**Not tuned:**" in text and "## Tuning" not in text


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_by_counting(n):
    scores = [0.3, 0.1, 0.5, 0.5, 0.2]
    want = np.mean([max(chosen) for chosen in itertools.combinations(scores, n)])
    assert best_of(scores, n) == pytest.approx(want)
