"""Seeds trained at once, stopped, killed or diverged: they go on as the unbroken group."""

import contextlib
import dataclasses
import math

import pytest
import torch
from small_seeds import configs_of, numbers, saved, tiny, together

import tab.train.together
import tab.train.training_run
from tab.train.loop import load_trained, train
from tab.train.together import FILE, train_seeds

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset():
    return tiny()


@pytest.mark.parametrize(("model", "attention"), [("mlp", "kimi_k2"), ("cnn", "performer")])
def test_stopped_and_resumed_is_the_unbroken_group(model, attention, dataset, tmp_path):
    configs = configs_of(model, attention, train__epochs=3)
    whole = together(configs, dataset, tmp_path / "whole")
    part = together(configs, dataset, tmp_path / "parts", stop_after=1)
    assert [outcome.status for outcome in part] == ["running"] * 2
    assert (tmp_path / "parts" / configs[0].id / FILE).exists()
    seen = []
    again = together(
        *(configs, dataset, tmp_path / "parts"), resume=True,
        on_epoch=lambda i, row: seen.append((i, row["epoch"])),
    )  # fmt: skip
    assert seen == [(0, 2), (1, 2), (0, 3), (1, 3)]
    assert [numbers(o) for o in again] == [numbers(o) for o in whole]
    for config in configs:
        a, b = (saved(tmp_path / name, config) for name in ("whole", "parts"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    before = [(tmp_path / "parts" / c.id / "model.safetensors").stat().st_mtime_ns for c in configs]
    assert numbers(together(configs, dataset, tmp_path / "parts", resume=True)[1]) == numbers(
        whole[1]
    )
    after = [(tmp_path / "parts" / c.id / "model.safetensors").stat().st_mtime_ns for c in configs]
    assert before == after  # finished seeds are not trained again


@pytest.mark.parametrize("at", [1, 3, 5])
def test_killed_between_two_files_it_goes_on(at, dataset, tmp_path, monkeypatch):
    """The process ends at the `at`-th write of a seed's files: after the group's checkpoint."""
    configs = configs_of("mlp", "self")
    whole = together(configs, dataset, tmp_path / "whole")

    class Killed(BaseException):
        pass

    writes, write = [], tab.train.together.TrainingRun.write

    def stop(run):
        writes.append(run)
        if len(writes) == at:
            raise Killed
        write(run)

    monkeypatch.setattr(tab.train.together.TrainingRun, "write", stop)
    with contextlib.suppress(Killed):
        together(configs, dataset, tmp_path / "killed")
    monkeypatch.undo()
    again = together(configs, dataset, tmp_path / "killed", resume=True)
    assert [numbers(o) for o in again] == [numbers(o) for o in whole]
    for config in configs:
        a, b = (saved(tmp_path / name, config) for name in ("whole", "killed"))
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("attention", ["multi_head", "kimi_k2"])
def test_a_seed_that_diverges_spoils_no_other(attention, dataset, tmp_path, monkeypatch):
    configs = configs_of("cnn", attention, 3, train__epochs=3)
    build = tab.train.training_run.build_model

    def poisoned(config, classes):
        model = build(config, classes)
        if config.seed == 0:
            model.backbone.convolutions[0].weight.data.mul_(math.nan)
        return model

    monkeypatch.setattr(tab.train.training_run, "build_model", poisoned)
    alone = [train(c, dataset, tmp_path / "alone" / c.id) for c in configs]
    part = together(configs, dataset, tmp_path / "group", stop_after=2)
    assert [outcome.status for outcome in part] == ["diverged", "running", "running"]
    found = together(configs, dataset, tmp_path / "group", resume=True)
    assert [outcome.status for outcome in found] == ["diverged", "done", "done"]
    assert [len(outcome.rows) for outcome in found] == [1, 3, 3]
    assert [row["seeds_at_once"] for row in found[1].rows] == [3, 2, 2]
    for one, own in zip(alone[1:], found[1:], strict=True):
        losses = [[row["train_loss"] for row in o.rows] for o in (one, own)]
        assert losses[1] == pytest.approx(losses[0], rel=5e-4)
    assert not (tmp_path / "group" / configs[0].id / FILE).exists()


def test_only_seeds_of_one_variant_and_as_they_began(dataset, tmp_path):
    configs = configs_of("mlp", "self")
    outs = [tmp_path / c.id for c in configs]
    other = [configs[0], dataclasses.replace(configs[1], attention="multi_head")]
    with pytest.raises(ValueError, match="more than the seed"):
        train_seeds(other, dataset, outs)
    with pytest.raises(ValueError, match="give each seed once"):
        train_seeds([configs[0]] * 2, dataset, outs)
    train_seeds(configs, dataset, outs, stop_after=1)
    with pytest.raises(ValueError, match="already holds"):
        train_seeds(configs, dataset, outs)
    with pytest.raises(ValueError, match="together with mlp-self-s0, mlp-self-s1"):
        train(configs[1], dataset, outs[1], resume=True)
    path = outs[0] / FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="start again"):
        assert train_seeds(configs, dataset, outs, resume=True)[0].status == "done"


def test_the_trained_model_of_a_seed_comes_back(dataset, tmp_path):
    configs = configs_of("cnn", "kimi_k2")
    found = together(configs, dataset, tmp_path)
    model, config = load_trained(tmp_path / configs[1].id)
    assert config == configs[1] and type(model.attention).__name__ == "KimiK2"
    assert found[1].summary["parameters"] == sum(p.numel() for p in model.parameters())
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    # One seed's weights, not the stack that they are a view of.
    assert (tmp_path / configs[1].id / "model.safetensors").stat().st_size < 1.5 * size + 30_000
