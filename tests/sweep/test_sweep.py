"""The sweep: what promotion means, what is chosen, what Optuna sees, and the command line."""

import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from forks import python
from patience import PATIENCE, until
from safetensors.torch import load_file
from typer.testing import CliRunner

optuna = pytest.importorskip("optuna")

from kill_sweep import DATA, result  # noqa: E402
from optuna.trial import TrialState  # noqa: E402
from small_sweep import MULTI, SELF, Count, begin, read, tab_sweep, whole  # noqa: E402

import tab.sweep.driver  # noqa: E402
from tab.cli.main import app  # noqa: E402
from tab.data.load import load_dataset  # noqa: E402
from tab.recipe.recipe import load_recipe  # noqa: E402
from tab.sweep.driver import records, sweep  # noqa: E402
from tab.sweep.halving import Budget  # noqa: E402
from tab.sweep.plan import SweepPlan  # noqa: E402
from tab.tasks.processes import Processes  # noqa: E402
from tab.train.loop import train  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset():
    return load_dataset(DATA)


@pytest.fixture(scope="module")
def done(tmp_path_factory, dataset):
    return whole(tmp_path_factory.mktemp("done"), dataset)


# --- what it does ---------------------------------------------------------------------------------


def test_rungs_promotions_and_winners(done):
    out, winners = done
    for pair, record in read(out).items():
        ended = record.ended()
        by_rung = [{n: e.score for (n, r), e in ended.items() if r == rung} for rung in range(3)]
        assert [len(rung) for rung in by_rung] == [5, 2, 1]
        for below, above in itertools.pairwise(by_rung):
            best = sorted(below, key=lambda n: (-below[n], n))[: len(above)]
            assert set(above) == set(best)
        assert winners[pair].entry.configuration == min(by_rung[2])
        assert [sorted(e.curve) for (n, r), e in ended.items() if r == 2] == [[3, 4]]
        drawn = [tuple(e.entry.params.items()) for (n, r), e in ended.items() if r == 0]
        assert len(set(drawn)) == 5
        if pair == MULTI:  # 3 divides 12 alone, 4 divides 4, 8 and 12
            assert all(dict(d)["hidden"] % dict(d)["num_heads"] == 0 for d in drawn)


def test_promotion_from_checkpoints_is_training_from_scratch(done, dataset, tmp_path):
    """Bit for bit: stopped at two rungs and continued, or trained in one go."""
    out, winners = done
    for pair, ended in winners.items():
        config = SweepPlan.load(out).config(pair, ended.entry.params)
        whole = train(config, dataset, tmp_path / pair[1])
        assert [row["validation_accuracy"] for row in whole.rows][-1] == ended.score
        folder = out / "runs" / f"mlp-{pair[1]}-c{ended.entry.configuration:03}"
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        for mine, theirs in zip(whole.rows, rows, strict=True):
            for key in ("train_loss", "validation_loss", "learning_rate"):
                assert mine[key] == theirs[key]
        a, b = (load_file(d / "model.safetensors") for d in (tmp_path / pair[1], folder))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_test_set_is_never_scored_and_all_validation_images_are(done):
    out, _ = done
    rows = [json.loads(s) for f in out.glob("runs/*/rows.jsonl") for s in f.read_text().split("\n")
            if s]  # fmt: skip
    assert len(rows) == 2 * (5 * 1 + 2 * 1 + 1 * 2)
    assert all(row["test_loss"] is None and row["test_accuracy"] is None for row in rows)
    assert {round(20 * row["validation_accuracy"], 9) % 1 for row in rows} == {0.0}


def test_losers_leave_no_checkpoint_and_all_their_rows(done):
    out, _ = done
    assert not list(out.glob("runs/*/checkpoint.pt"))
    assert len(list(out.glob("runs/*/rows.jsonl"))) == 10


def test_two_processes_choose_the_same(dataset, tmp_path):
    small = {"attentions": ["multi_head"], "budget": Budget(4, (1, 2), 2.0, 60, 20)}
    one, two = (begin(tmp_path / name, dataset, **small) for name in ("one", "two"))
    sweep(SweepPlan.load(one), dataset, one)
    sweep(SweepPlan.load(two), dataset, two, executor=Processes(2, threads=1))
    assert result(two) == result(one)


def test_a_finished_sweep_trains_nothing_again(done, dataset):
    out, winners = done
    before, watcher = result(out), Count()
    assert sweep(SweepPlan.load(out), dataset, out, watcher=watcher) == winners
    assert (watcher.epochs, watcher.ended, result(out)) == (0, [], before)


def test_another_seed_draws_others(done, dataset, tmp_path):
    out = begin(tmp_path, dataset, seed=1, attentions=["self"], budget=Budget(5, (1,), 2, 60, 20))
    sweep(SweepPlan.load(out), dataset, out)
    chosen = [[e.entry.params for e in read(o)[SELF].ended().values()][:5] for o in (out, done[0])]
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize("changes", [{"sampler": "tpe"}, {"brackets": 2}])
def test_batches_and_brackets_resume_to_the_same(changes, dataset, tmp_path):
    """Stopped after every few trials, by a disk that fails."""
    changes |= {"attentions": ["multi_head"]}
    whole = begin(tmp_path / "whole", dataset, **changes)
    sweep(SweepPlan.load(whole), dataset, whole)
    drawn = [e.entry for e in read(whole)[MULTI].ended().values()]
    assert len({tuple(e.params.items()) for e in drawn}) == max(e.configuration for e in drawn) + 1

    class Stop(Count):
        def end(self, pair, ended):
            super().end(pair, ended)
            if len(self.ended) == 3:
                raise OSError(errno.ENOSPC, "no space left on device")

    out, total = begin(tmp_path / "stopped", dataset, **changes), 0
    while True:
        watcher = Stop()
        try:
            sweep(SweepPlan.load(out), dataset, out, watcher=watcher)
            break
        except OSError:
            total += watcher.epochs
    assert result(out) == result(whole)
    assert total + watcher.epochs == sum(len(e.curve) for e in read(whole)[MULTI].ended().values())


def test_the_winners_are_a_recipe_that_compare_runs(done, tmp_path):
    out, winners = done
    recipe = load_recipe(out / "winners.toml")
    run = recipe.run_config(*MULTI, 0)
    chosen = winners[MULTI].entry.params
    assert run.train.lr == chosen["lr"] and run.model_options.hidden == chosen["hidden"]
    assert run.attention_options["num_heads"] == chosen["num_heads"]
    assert run.train.epochs == load_recipe("quick").run_config(*MULTI, 0).train.epochs
    names = ("--models", "mlp", "--attentions", "self,multi_head", "--data", DATA)
    small = ("--epochs", "1", "--set", "data.images=60", "--set", "data.validation=20")
    words = ["compare", "--recipe", str(out / "winners.toml"), *names, *small]
    ran = CliRunner().invoke(app, [*words, "--device", "cpu", "--out", str(tmp_path / "grid")])
    assert ran.exit_code == 0, ran.output
    found = json.loads((tmp_path / "grid/runs/mlp-multi_head-s0/run.json").read_text())["config"]
    assert found["train"]["lr"] == chosen["lr"]


# --- what Optuna sees -----------------------------------------------------------------------------


def test_the_studies_are_optunas(done):
    out, winners = done
    backend = optuna.storages.journal.JournalFileBackend(str(out / "study.journal"))
    storage = optuna.storages.JournalStorage(backend)
    assert sorted(optuna.get_all_study_names(storage)) == ["sweep/mlp-multi_head", "sweep/mlp-self"]
    study = optuna.load_study(study_name="sweep/mlp-multi_head", storage=storage)
    states = [t.state for t in study.trials]
    assert states == [TrialState.PRUNED] * 7 + [TrialState.COMPLETE]
    assert study.best_trial.params == winners[MULTI].entry.params
    assert study.best_value == winners[MULTI].score
    assert study.best_trial.user_attrs["rung"] == 2
    attrs = study.best_trial.user_attrs
    name = f"mlp-multi_head-c{attrs['configuration']:03}"
    assert attrs["parent"] == f"runs/{name}/checkpoint.pt"
    assert f":{os.getpid()} since" in attrs["lease"]


def test_importance_of_what_matters(tmp_path, dataset):
    out = begin(tmp_path, dataset)
    with records(SweepPlan.load(out), out, mine=True) as found:
        record = found[MULTI]
        assert record.importance() == {}
        for i, chosen in enumerate(
            record.draw(14, lambda chosen: True, sampler="random", seed=0, step=(0, 0))
        ):
            entry = tab.sweep.driver.Entry(i, 0, 0, 0, 1, "", chosen)
            record.enqueue(entry)
            score = chosen["lr"] * 50 + chosen["hidden"] * 1e-6
            record.tell(tab.sweep.driver.Ended(entry, "done", score, {1: score}, 0.0), last=False)
        shares = record.importance()
    assert max(shares, key=shares.get) == "lr" and sum(shares.values()) == pytest.approx(1)


# --- the command line -----------------------------------------------------------------------------


def test_show_reads_what_is_there(done):
    out, winners = done
    (out / "halving.png").unlink(missing_ok=True)
    ran = tab_sweep("show", out)
    assert ran.exit_code == 0, ran.output
    first = [e.score for (n, rung), e in read(out)[MULTI].ended().items() if rung == 0]
    assert re.search(rf"Multi-Head +{100 * max(first):.1f} → ", ran.output)
    assert f"→ {100 * winners[MULTI].score:.1f}" in ran.output
    assert (out / "halving.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "publisched"], "did you mean 'published'"),
        (["--space", "publisched"], "did you mean 'published'"),
        (["--epochs", "3,x"], "whole numbers"),
        (["--epochs", "3,2"], "rising"),
        (["--brackets", "4"], "1 to 3"),
        (["--brackets", "0"], "1 to 3"),
        (["--sampler", "grid"], "random or tpe"),
        (["--storage", "sqlite:///x"], "postgresql://"),
        (["--attentions", "multihead"], "did you mean 'multi_head'"),
        (["--resume", "nowhere"], "no sweep.toml"),
        (["show", "nowhere"], "no sweep.toml"),
    ],
)
def test_bad_input_is_one_red_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = [] if words[0] in ("show", "--resume") else ["--data", DATA]
    ran = tab_sweep(*words, *data)
    assert ran.exit_code == 2, ran.output
    assert message in re.sub(r"\s+", " ", ran.stderr)
    assert not (tmp_path / "results").exists()


def test_resume_takes_no_new_wishes(done):
    ran = tab_sweep("--resume", done[0], "--models", "mlp", "--seed", 0)
    assert ran.exit_code == 2 and "drop --models, --seed" in re.sub(r"\s+", " ", ran.stderr)
    assert "Next: tab compare --recipe=" in tab_sweep("--resume", done[0], "--jobs", 1).output


def test_without_optuna_the_extra_is_named():
    program = (
        "import sys; sys.modules['optuna'] = None; sys.argv[1:] = ['sweep']; import tab.cli.main\n"
    )
    ran = python("-c", program + "tab.cli.main.main()")
    assert ran.returncode == 2 and "transformer-attention-bench[sweep]" in ran.stderr


def test_control_c_says_how_to_go_on(dataset, tmp_path):
    out = begin(tmp_path, dataset, budget=Budget(5, (2000, 4000), 2.0, 60, 20))
    command = [sys.executable, "-m", "tab", "sweep", "--resume", str(out)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    assert until(lambda: list(out.glob("runs/*/rows.jsonl")) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, text
    assert f"tab sweep --resume {out}" in text and "Traceback" not in text
