"""What a comparison spends beside training: little for each run, however many there are."""

import json
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

import tab.compare.driver
from tab.compare.driver import compare
from tab.compare.plan import Grid, Plan
from tab.compare.runs import read_runs
from tab.data.load import load_dataset
from tab.recipe.recipe import load_recipe
from tab.train.loop import train

DATA = "shapes:100/20"
TINY = {
    **{"train.epochs": 2, "train.batch_size": 20, "data.images": 60, "data.validation": 20},
    **{"model.mlp.hidden": 8, "model.mlp.tokens": 4},
}


@pytest.fixture(scope="module")
def dataset():
    return load_dataset(DATA)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset, one_thread):
    out = tmp_path_factory.mktemp("trained")
    train(load_recipe("quick", TINY).run_config("mlp", "none", 0), dataset, out)
    return out


class World:
    """A clock, and runs of a second each: all a copy of one that was trained."""

    def __init__(self, trained: Path, monkeypatch):
        self.trained, self.now, self.writes = trained, 0.0, []
        self.reads: Counter[str] = Counter()
        write = tab.compare.driver.write_csvs
        read = Path.read_bytes

        def write_csvs(out, runs):
            write(out, runs)
            ended = sum(run.status == "done" for run in runs)
            self.writes.append((self.now, ended, 0.01 * ended))
            self.now += 0.01 * ended

        def read_bytes(path):
            self.reads[path.name] += 1
            return read(path)

        monkeypatch.setattr(tab.compare.driver, "train", self.train)
        monkeypatch.setattr(tab.compare.driver, "write_csvs", write_csvs)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(Path, "read_bytes", read_bytes)

    def train(self, config, dataset, out, **_):
        if not (out / "run.json").exists():
            shutil.copytree(self.trained, out, dirs_exist_ok=True)
            run = json.loads((out / "run.json").read_text())
            (out / "run.json").write_text(json.dumps(run | {"config": config.to_dict()}))
            self.now += 1


def plan(seeds: int) -> Plan:
    return Plan(load_recipe("quick", TINY), Grid("quick", ["mlp"], ["none"], seeds, DATA, "cpu"))


def test_the_share_of_it_does_not_grow_with_the_runs(trained, dataset, tmp_path, monkeypatch):
    """Both files take the longer the more runs there are: here a hundredth of a second a run."""
    shares, reads = [], []
    for seeds in (20, 100):
        with monkeypatch.context() as patched:
            world = World(trained, patched)
            plan(seeds).save(tmp_path / str(seeds), dataset)
            runs = compare(plan(seeds), dataset, tmp_path / str(seeds))
        assert [run.status for run in runs] == ["done"] * seeds
        *before, (_, ended, _) = world.writes
        assert ended == seeds  # the last write has them all
        assert before and before[0][1] == 1  # and there is something to see from the first on
        shares.append(sum(cost for *_, cost in before) / world.now)
        reads.append(sum(world.reads[name] for name in ("run.json", "rows.jsonl")) / seeds)
    assert max(shares) < 0.01
    assert reads == [reads[0]] * 2 and reads[0] <= 4


def test_what_a_kill_left_out_of_the_files_is_there_after_resume(
    trained, dataset, tmp_path, monkeypatch
):
    """The files say nothing yet of the last runs; those themselves are all on disk."""
    out, whole = tmp_path / "out", tmp_path / "whole"

    class Killed(BaseException):
        pass

    class Watcher(tab.compare.driver.Watcher):
        ends = 0

        def end(self, run):
            self.ends += 1
            if self.ends == 7:
                raise Killed

    with monkeypatch.context() as patched:
        World(trained, patched)
        for place in (out, whole):
            plan(10).save(place, dataset)
        compare(plan(10), dataset, whole)
        with pytest.raises(Killed):
            compare(plan(10), dataset, out, watcher=Watcher())
        assert sum(run.status == "done" for run in read_runs(out, plan(10).grid)) == 7
        behind = (out / "experiment_results.csv").read_text().count("\n")
        assert behind < 1 + 7 * 2
        compare(plan(10), dataset, out)
    for name in ("experiment_results.csv", "experiment_summary.csv"):
        assert (out / name).read_text() == (whole / name).read_text()
