"""The sweep: what promotion means, what is chosen, what Optuna sees, what faults cost.

Each fault ends in a clear message; nothing that ended is trained again or counted twice, and the
winners are those of an unbroken sweep.

fault                                       shown by
a driver killed, at any moment              test_killed_drivers_*, kill_sweep.py (a hundred times)
what it left: RUNNING trials, a lock,       test_what_a_killed_driver_left_is_cleared
half a line of the journal
a process of --jobs killed, a Ray node      test_executor.py, test_ray.py
Control-C                                   test_control_c_*, test_postgresql_holds_the_same_sweep
a full disk                                 test_a_full_disk_*, test_batches_and_brackets_*
a truncated checkpoint                      test_a_truncated_checkpoint_*
a damaged journal                           test_a_damaged_journal_*
a Ray node, within a rung                   test_ray.py: test_a_sweep_has_the_same_*
two drivers of one sweep                    test_two_drivers_*, test_postgresql_has_one_driver
a loss that is not a number                 test_a_diverged_run_*
an exception in one configuration           test_an_exception_*
other data than it began with               test_other_data_*
no database                                 test_a_database_that_is_not_there
"""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tasks import until
from typer.testing import CliRunner

optuna = pytest.importorskip("optuna")

from kill_sweep import DATA, plan, result  # noqa: E402

import tab.sweep  # noqa: E402
from tab import checkpoint  # noqa: E402
from tab.cli import app  # noqa: E402
from tab.data import load_dataset  # noqa: E402
from tab.executor import Processes  # noqa: E402
from tab.halving import Budget  # noqa: E402
from tab.recipe import load_recipe  # noqa: E402
from tab.space import load_space  # noqa: E402
from tab.study import TrialState  # noqa: E402
from tab.sweep import Watcher, records, sweep  # noqa: E402
from tab.sweep_plan import Plan, name_of  # noqa: E402
from tab.train import train  # noqa: E402

SELF, MULTI = ("mlp", "self"), ("mlp", "multi_head")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset():
    return load_dataset(DATA)


def begin(folder: Path, dataset, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    plan(folder, **changes).save(folder / "sweep", dataset)
    return folder / "sweep"


@pytest.fixture(scope="module")
def done(tmp_path_factory, dataset):
    """A whole sweep in this process; -> its directory and winners."""
    out = begin(tmp_path_factory.mktemp("done"), dataset)
    return out, sweep(Plan.load(out), dataset, out)


class Count(Watcher):
    def __init__(self):
        self.epochs, self.ended = 0, []

    def epoch(self, pair, entry, row):
        self.epochs += 1

    def end(self, pair, ended):
        self.ended.append((pair, ended.entry.configuration, ended.entry.rung, ended.status))


def read(out: Path):
    with records(Plan.load(out), out) as found:
        return found


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
        config = Plan.load(out).config(pair, ended.entry.params)
        whole = train(config, dataset, tmp_path / pair[1])
        assert [row["validation_accuracy"] for row in whole.rows][-1] == ended.score
        folder = out / "runs" / f"mlp-{pair[1]}-c{ended.entry.configuration:03}"
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        for mine, theirs in zip(whole.rows, rows, strict=True):
            for key in ("train_loss", "validation_loss", "learning_rate"):
                assert mine[key] == theirs[key]
        a, b = (checkpoint.load(d / "model.pt") for d in (tmp_path / pair[1], folder))
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
    sweep(Plan.load(one), dataset, one)
    sweep(Plan.load(two), dataset, two, executor=Processes(2, threads=1))
    assert result(two) == result(one)


def test_a_finished_sweep_trains_nothing_again(done, dataset):
    out, winners = done
    before, watcher = result(out), Count()
    assert sweep(Plan.load(out), dataset, out, watcher=watcher) == winners
    assert (watcher.epochs, watcher.ended, result(out)) == (0, [], before)


def test_another_seed_draws_others(done, dataset, tmp_path):
    out = begin(tmp_path, dataset, seed=1, attentions=["self"], budget=Budget(5, (1,), 2, 60, 20))
    sweep(Plan.load(out), dataset, out)
    chosen = [[e.entry.params for e in read(o)[SELF].ended().values()][:5] for o in (out, done[0])]
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize("changes", [{"sampler": "tpe"}, {"brackets": 2}])
def test_batches_and_brackets_resume_to_the_same(changes, dataset, tmp_path):
    """Stopped after every few trials, by a disk that fails."""
    changes |= {"attentions": ["multi_head"]}
    whole = begin(tmp_path / "whole", dataset, **changes)
    sweep(Plan.load(whole), dataset, whole)
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
            sweep(Plan.load(out), dataset, out, watcher=watcher)
            break
        except OSError:
            total += watcher.epochs
    assert result(out) == result(whole)
    assert total + watcher.epochs == sum(len(e.curve) for e in read(whole)[MULTI].ended().values())


def test_the_winners_are_a_recipe_that_compare_runs(done, tmp_path):
    out, winners = done
    recipe = load_recipe(out / "winners.toml")
    run = recipe.run(*MULTI, 0)
    chosen = winners[MULTI].entry.params
    assert run.train.lr == chosen["lr"] and run.model_options.hidden == chosen["hidden"]
    assert run.attention_options["num_heads"] == chosen["num_heads"]
    assert run.train.epochs == load_recipe("quick").run(*MULTI, 0).train.epochs
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
    with records(Plan.load(out), out, mine=True) as found:
        record = found[MULTI]
        assert record.importance() == {}
        for i, chosen in enumerate(
            record.draw(14, lambda chosen: True, sampler="random", seed=0, step=(0, 0))
        ):
            entry = tab.sweep.Entry(i, 0, 0, 0, 1, "", chosen)
            record.enqueue(entry)
            score = chosen["lr"] * 50 + chosen["hidden"] * 1e-6
            record.tell(tab.sweep.Ended(entry, "done", score, {1: score}, 0.0), last=False)
        shares = record.importance()
    assert max(shares, key=shares.get) == "lr" and sum(shares.values()) == pytest.approx(1)


# --- faults ---------------------------------------------------------------------------------------


def kills(times: int, folder: Path, **changes) -> str:
    """What kill_sweep.kill returns, in a process of its own: it forks."""
    program = (
        "import json, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import kill_sweep\n"
        "changes = json.loads(sys.argv[4])\n"
        "print(kill_sweep.kill(int(sys.argv[3]), Path(sys.argv[2]), **changes))"
    )
    words = (Path(__file__).parent, folder, times, json.dumps(changes))
    command = [sys.executable, "-c", program, *map(str, words)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return ran.stdout.strip() or ran.stderr


def test_killed_drivers_lose_and_double_nothing(tmp_path):
    """tests/kill_sweep.py does it a hundred times."""
    assert re.fullmatch(r"\(2, \d+, \[\]\)", found := kills(2, tmp_path)), found


def test_what_a_killed_driver_left_is_cleared(dataset, tmp_path):
    """A RUNNING trial, the journal's lock, and half a line at its end."""
    out = begin(tmp_path, dataset, attentions=["self"])
    it = Plan.load(out)
    with records(it, out, mine=True) as found:
        entry = tab.sweep.Entry(0, 0, 0, 0, 1, "", {"lr": 0.001, "hidden": 4})
        found[SELF].enqueue(entry)
        found[SELF].begin(entry)
    (out / "study.journal.lock").symlink_to("study.journal")
    with (out / "study.journal").open("a") as file:
        file.write('{"op_code": 4, "worker')
    sweep(it, dataset, out)
    trials = read(out)[SELF].study.trials
    assert (trials[0].state, trials[0].user_attrs["status"]) == (TrialState.FAIL, "lost")
    assert not {t.state for t in trials} & {TrialState.RUNNING, TrialState.WAITING}
    assert len(read(out)[SELF].ended()) == 5 + 2 + 1


def test_a_damaged_journal_is_named_and_can_be_made_anew(done, dataset, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "sweep")
    journal = out / "study.journal"
    journal.write_bytes(journal.read_bytes().replace(b'"op_code":4', b'"op_code:4', 1))
    with pytest.raises(ValueError, match=r"study\.journal is damaged"):
        sweep(Plan.load(out), dataset, out)
    journal.unlink()
    sweep(Plan.load(out), dataset, out)
    assert result(out) == result(done[0])


def test_a_diverged_run_is_counted_and_never_promoted(dataset, tmp_path):
    path = tmp_path / "wild.toml"
    path.write_text("[train]\nlr = [0.001, 0.003, 1e30]\n[model]\nhidden = [4]\n")
    changes = {"space": load_space(path), "budget": Budget(3, (1, 2), 1.1, 60, 20)}
    out = begin(tmp_path, dataset, attentions=["self"], **changes)
    sweep(Plan.load(out), dataset, out)
    ended = read(out)[SELF].ended()
    wild = [n for (n, r), e in ended.items() if e.entry.params["lr"] == 1e30]
    assert [e.status for (n, r), e in ended.items() if n in wild] == ["diverged"]
    assert sum(r == 1 for n, r in ended) == 2
    assert ",diverged,," in (out / "trials.csv").read_text()


def test_an_exception_ends_its_configuration_and_is_not_tried_again(dataset, tmp_path, monkeypatch):
    calls = []

    def failing(config, dataset, epochs, device, *, folder, emit):
        calls.append(folder.name)
        if folder.name.endswith("c001"):
            raise RuntimeError("out of memory")
        return tab.sweep_train(config, dataset, epochs, device, folder=folder, emit=emit)

    monkeypatch.setattr(tab, "sweep_train", tab.sweep.train_rung, raising=False)
    monkeypatch.setattr(tab.sweep, "train_rung", failing)
    out = begin(tmp_path, dataset, attentions=["self"])
    for _ in range(2):
        sweep(Plan.load(out), dataset, out)
        assert calls.count("mlp-self-c001") == 1 and len(calls) == 5 + 2 + 1
    end = read(out)[SELF].ended()[1, 0]
    assert (end.status, end.error) == ("failed", "RuntimeError: out of memory")
    assert "Traceback" in (out / "runs/mlp-self-c001/error.txt").read_text()


def test_a_truncated_checkpoint_costs_its_own_run_its_epochs(done, dataset, tmp_path):
    out = begin(tmp_path, dataset)

    class Stop(Count):
        def step(self, bracket, rung, entries):
            if rung == 1 and entries:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(Plan.load(out), dataset, out, watcher=Stop())
    with records(Plan.load(out), out) as found:
        waiting = found[SELF].study.get_trials(states=(TrialState.WAITING,))
    path = out / waiting[0].user_attrs["parent"]
    path.write_bytes(path.read_bytes()[:-100])
    watcher = Count()
    with pytest.warns(UserWarning, match="starts again"):
        sweep(Plan.load(out), dataset, out, watcher=watcher)
    assert result(out) == result(done[0])
    assert watcher.epochs == 2 * (2 * 1 + 1 * 2) + 1


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounts a small tmpfs")
def test_a_full_disk_stops_the_sweep_which_goes_on_with_room(done, dataset, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs here")
    try:
        out = begin(place, dataset)
        with pytest.raises(OSError) as caught:
            sweep(Plan.load(out), dataset, out)
        assert caught.value.errno == errno.ENOSPC
        subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
        sweep(Plan.load(out), dataset, out)
        assert result(out) == result(done[0])
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_two_drivers_do_not_share_a_sweep(done, dataset):
    out, _ = done
    with checkpoint.locked(out), pytest.raises(ValueError, match="in use by process"):
        sweep(Plan.load(out), dataset, out)


def test_other_data_is_refused_before_anything_fails_of_it(dataset, tmp_path):
    out = begin(tmp_path, dataset, attentions=["self"])
    with pytest.raises(ValueError, match=r"was made with shapes:100/20 .* give the same data"):
        sweep(Plan.load(out), load_dataset("shapes:110/20"), out)
    assert not (out / "study.journal").exists()


def test_a_directory_of_something_else(done, dataset, tmp_path):
    with pytest.raises(ValueError, match="already holds a sweep"):
        plan(tmp_path).save(done[0], dataset)
    with pytest.raises(ValueError, match=r"no sweep\.toml"):
        Plan.load(tmp_path)
    it = plan(tmp_path, budget=Budget(2, (1,), 2, 60, 500))
    with pytest.raises(ValueError, match="500"):
        it.save(tmp_path / "new", dataset)
    assert not (tmp_path / "new").exists()


# --- the command line -----------------------------------------------------------------------------


def tab_sweep(*words: object):
    return CliRunner().invoke(app, ["sweep", *map(str, words)])


def test_show_reads_what_is_there(done):
    out, winners = done
    (out / "halving.png").unlink(missing_ok=True)
    ran = tab_sweep("show", out)
    assert ran.exit_code == 0, ran.output
    first = [e.score for (n, rung), e in read(out)[MULTI].ended().items() if rung == 0]
    assert f"5: {max(first):.1%}" in ran.output
    assert "Multi-Head" in ran.output and f"{winners[MULTI].score:.1%}" in ran.output
    assert (out / "halving.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "sed"], "did you mean 'seed'"),
        (["--space", "sed"], "did you mean 'seed'"),
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
    assert "Compare the winners" in tab_sweep("--resume", done[0], "--jobs", 1).output


def test_without_optuna_the_extra_is_named():
    program = "import sys; sys.modules['optuna'] = None; sys.argv[1:] = ['sweep']; import tab.cli\n"
    command = [sys.executable, "-c", program + "tab.cli.main()"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2 and "transformer-attention-bench[sweep]" in ran.stderr


def test_control_c_says_how_to_go_on(dataset, tmp_path):
    out = begin(tmp_path, dataset, budget=Budget(5, (2000, 4000), 2.0, 60, 20))
    command = [sys.executable, "-m", "tab", "sweep", "--resume", str(out)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    assert until(lambda: list(out.glob("runs/*/rows.jsonl")) or process.poll(), 120)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert f"tab sweep --resume {out}" in text and "Traceback" not in text


# --- PostgreSQL -----------------------------------------------------------------------------------


def _server() -> Path | None:
    found = [shutil.which("initdb"), *Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return next((Path(path).parent for path in found if path), None)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """The address of a PostgreSQL server of our own, on a free port of this machine."""
    pytest.importorskip("psycopg")
    if not (programs := _server()):
        pytest.skip("no PostgreSQL server here: initdb was not found")
    import socket
    import tempfile

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="pg") as place:
        run = {"check": True, "capture_output": True, "timeout": 60}
        if os.geteuid() == 0:  # a server refuses to run as root
            shutil.chown(place, "postgres", "postgres")
            run |= {"user": "postgres", "group": "postgres"}
        data = f"{place}/data"
        subprocess.run([programs / "initdb", "-D", data, "-U", "tab", "-A", "trust"], **run)
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c fsync=off"
        options += f" -c unix_socket_directories={place}"
        server = [programs / "pg_ctl", "-D", data, "-l", f"{place}/log", "-w"]
        subprocess.run([*server, "-o", options, "start"], **run)
        try:
            yield f"postgresql://tab@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*server, "-m", "immediate", "stop"], **run)


def test_postgresql_holds_the_same_sweep(database, done, dataset, tmp_path):
    out = begin(tmp_path, dataset, storage=database)
    it, watcher = Plan.load(out), Count()

    class Stop(Count):
        def end(self, pair, ended):
            super().end(pair, ended)
            if len(self.ended) == 7:
                raise KeyboardInterrupt

    stopped = Stop()
    with pytest.raises(KeyboardInterrupt):
        sweep(it, dataset, out, watcher=stopped)
    sweep(it, dataset, out, watcher=watcher)
    assert result(out) == result(done[0])
    assert stopped.epochs + watcher.epochs == 2 * (5 + 2 + 2)
    assert not (out / "study.journal").exists()
    assert tab_sweep("show", out).exit_code == 0
    address = database.replace("postgresql", "postgresql+psycopg")
    study = optuna.load_study(study_name=f"{name_of(out)}/mlp-self", storage=address)
    assert study.best_trial.user_attrs["rung"] == 2


def test_postgresql_after_a_kill(database, tmp_path):
    """The server notices that the driver is gone, and lets the next one in."""
    found = kills(1, tmp_path, storage=database)
    assert re.fullmatch(r"\(1, \d+, \[\]\)", found), found


def test_postgresql_has_one_driver(database, dataset, tmp_path):
    """Also from a copy of the directory, on another machine perhaps."""
    out = begin(tmp_path / "a", dataset, storage=database)
    copy = shutil.copytree(out, tmp_path / "b" / "sweep")
    with records(Plan.load(out), out, mine=True), pytest.raises(ValueError, match="another driver"):
        sweep(Plan.load(copy), dataset, copy)


def test_a_database_that_is_not_there(dataset, tmp_path):
    out = begin(tmp_path, dataset, storage=f"postgresql://tab:secret@/x?host={tmp_path}")
    assert "secret" not in (out / "sweep.toml").read_text()
    with pytest.raises(ValueError, match="no database at postgresql://tab@"):
        sweep(Plan.load(out), dataset, out)
