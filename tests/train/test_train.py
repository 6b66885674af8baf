"""Training: it learns; stopped and resumed it is the same run; damage, NaN and locks are met."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from small_training import SMALL, TIMES, split

from tab import files
from tab.data.load import Dataset
from tab.layers.basic import NoAttention
from tab.models.flops import forward_flops
from tab.models.image_model import build_model
from tab.ops._op import OPS
from tab.recipe.recipe import load_recipe
from tab.train import checkpoint
from tab.train.loop import load_trained, train
from tab.train.training_run import ANSWERS, ROW


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These batches are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset():
    classes = tuple("abcdefghij")
    return Dataset("tiny", classes, split(240, 1), split(80, 2), "made for tests", "0123")


def config_of(model="mlp", attention="multi_head", recipe="fair", seed=0, **overrides):
    given = {k.replace("__", "."): v for k, v in overrides.items()}
    return load_recipe(recipe, {**SMALL, **given}).run_config(model, attention, seed)


def numbers(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet9"])
@pytest.mark.parametrize("recipe", ["document", "fair"])
def test_it_learns_and_leaves_what_it_promises(model, recipe, dataset, tmp_path):
    # Not moved: the class is where the bright rows are.
    config = config_of(model, recipe=recipe, train__epochs=6, train__lr=0.01, data__translate=0)
    if recipe == "document":
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=0))
    seen = []
    outcome = train(config, dataset, tmp_path / "run", on_epoch=seen.append)
    assert outcome.status == "done" == outcome.summary["status"]
    assert seen == outcome.rows and [row["epoch"] for row in seen] == [1, 2, 3, 4, 5, 6]
    assert all(tuple(row) == ROW for row in seen)
    assert outcome.summary["final_test_accuracy"] > 0.25
    assert seen[-1]["train_loss"] < seen[0]["train_loss"]
    tested = [row["test_accuracy"] is not None for row in seen]
    assert tested == ([True] * 6 if recipe == "document" else [False] * 5 + [True])
    assert (seen[0]["validation_loss"] is None) == (recipe == "document")
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"run.json", "rows.jsonl", "model.safetensors", "test.npz", "lock"}
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "done" and run["summary"] == outcome.summary
    assert run["environment"]["torch"] == torch.__version__


def test_answers_of_the_scored_test_set_are_kept(dataset, tmp_path):
    outcome = train(config_of("cnn"), dataset, tmp_path / "a")
    with np.load(tmp_path / "a" / ANSWERS, allow_pickle=False) as found:
        assert found["label"].tolist() == dataset.test.labels.tolist()
        assert found["predicted"].dtype == np.uint8
        right = found["predicted"] == found["label"]
    assert right.mean() == outcome.summary["final_test_accuracy"]
    never = config_of(evaluate__split="validation_only")
    train(never, dataset, tmp_path / "b")
    assert not (tmp_path / "b" / ANSWERS).exists()


def test_the_trained_model_comes_back(dataset, tmp_path):
    config = config_of("cnn")
    outcome = train(config, dataset, tmp_path)
    model, again = load_trained(tmp_path)
    assert again == config and not model.training
    mean, std = 128.0, 64.0
    x = (dataset.test.images.permute(0, 3, 1, 2).float() - mean) / std
    assert torch.isfinite(model(x)).all()
    assert outcome.summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert outcome.summary["attention_parameters"] == 3 * 16 * 16 + 16 * 16 + 16


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("schedule", ["constant", "one_cycle"])
def test_stopped_and_resumed_is_the_unbroken_run(model, schedule, dataset, tmp_path):
    config = config_of(model, train__schedule=schedule)
    whole = train(config, dataset, tmp_path / "whole")
    first = train(config, dataset, tmp_path / "parts", stop_after=1)
    assert (first.status, len(first.rows)) == ("running", 1)
    torch.rand(3)  # whatever else the process does
    rest = train(config, dataset, tmp_path / "parts", resume=True)
    assert numbers(rest.rows) == numbers(whole.rows)
    a, b = (load_trained(tmp_path / d)[0].state_dict() for d in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = ((tmp_path / d / ANSWERS).read_bytes() for d in ("whole", "parts"))
    assert a == b
    again = train(config, dataset, tmp_path / "parts", resume=True)
    assert again.rows == rest.rows and again.summary == rest.summary


def test_control_c_keeps_the_last_complete_epoch(dataset, tmp_path):
    config = config_of()
    whole = train(config, dataset, tmp_path / "whole")

    def interrupt(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, dataset, tmp_path / "cut", on_epoch=interrupt)
    assert len((tmp_path / "cut" / "rows.jsonl").read_text().splitlines()) == 2
    rest = train(config, dataset, tmp_path / "cut", resume=True)
    assert numbers(rest.rows) == numbers(whole.rows)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_checkpoint_starts_the_run_again(damage, dataset, tmp_path):
    config = config_of()
    whole = train(config, dataset, tmp_path / "whole")
    train(config, dataset, tmp_path / "run", stop_after=1)
    path = tmp_path / "run" / "checkpoint.pt"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    cut = {"truncate": raw[: len(raw) // 2], "flip": raw, "empty": b""}[damage]
    path.write_bytes(cut)
    with pytest.raises(files.Corrupt, match="truncated or altered"):
        checkpoint.load(path)
    with pytest.warns(UserWarning, match="starts again"):
        outcome = train(config, dataset, tmp_path / "run", resume=True)
    assert numbers(outcome.rows) == numbers(whole.rows)


def test_a_run_that_diverges_ends_and_keeps_its_rows(dataset, tmp_path):
    config = config_of("mlp", "none", train__lr=1e30, train__schedule="constant")
    outcome = train(config, dataset, tmp_path)
    assert outcome.status == "diverged" == outcome.summary["status"]
    assert 1 <= len(outcome.rows) < 3 and not math.isfinite(outcome.rows[-1]["train_loss"])
    assert train(config, dataset, tmp_path, resume=True).status == "diverged"
    with pytest.raises(ValueError, match="is diverged"):
        load_trained(tmp_path)


def test_a_directory_holds_one_run(dataset, tmp_path):
    train(config_of(), dataset, tmp_path, stop_after=1)
    with pytest.raises(ValueError, match="already holds a run: resume"):
        train(config_of(), dataset, tmp_path)
    with pytest.raises(ValueError, match=r"seed was 0, is 1"):
        train(config_of(seed=1), dataset, tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"train.lr was 0.001, is 0.1"):
        train(config_of(train__lr=0.1), dataset, tmp_path, resume=True)
    other = dataclasses.replace(dataset, name="other", fingerprint="4567")
    with pytest.raises(ValueError, match=r"trained on tiny \(0123\), not on other \(4567\)"):
        train(config_of(), other, tmp_path, resume=True)
    with files.locked(tmp_path), pytest.raises(ValueError, match="in use by process"):
        train(config_of(), dataset, tmp_path, resume=True)
    with pytest.raises(ValueError, match="is running"):
        load_trained(tmp_path)


def test_hooks_of_the_attention_are_called(dataset, tmp_path, monkeypatch):
    steps = []
    weight = torch.zeros((), requires_grad=True)
    monkeypatch.setattr(NoAttention, "after_step", lambda self: steps.append(1))
    monkeypatch.setattr(NoAttention, "auxiliary_loss", lambda self: 2 * weight)
    train(config_of(attention="none", train__epochs=1), dataset, tmp_path)
    assert len(steps) == 200 // 32 and weight.grad == 2 * len(steps)


def test_same_seed_same_data_for_every_variant(dataset, tmp_path):
    """At a rate of almost nothing the residual variants stay the control: equal images, weights."""
    rows = [
        train(config_of(attention=a, train__lr=1e-30), dataset, tmp_path / a).rows
        for a in ("none", "multi_head")
    ]
    assert [r["train_loss"] for r in rows[0]] == pytest.approx([r["train_loss"] for r in rows[1]])


@pytest.mark.parametrize("attention", ["none_again", "performer", "random", "sparse"])
def test_every_seed_of_64_bits_trains(attention, dataset, tmp_path):
    for seed in (-(2**63), 2**63 - 1):
        config = config_of(attention=attention, seed=seed, train__epochs=2, data__images=32)
        assert train(config, dataset, tmp_path / str(seed)).status == "done"


def test_a_subset_is_used(dataset, tmp_path):
    outcome = train(config_of(data__images=100, train__epochs=1), dataset, tmp_path)
    row = outcome.rows[0]
    assert row["images_per_second"] * row["seconds"] == pytest.approx(96)  # 3 batches of 32


def test_too_few_images(dataset, tmp_path):
    with pytest.raises(ValueError, match="no batch: 200 images, batch_size 512"):
        train(config_of(train__batch_size=512), dataset, tmp_path / "a")
    with pytest.raises(ValueError, match=r"needs data.validation above 0"):
        train(config_of(data__validation=0), dataset, tmp_path / "b")


def test_flops_of_the_document_mlp():
    """Two a multiply-add: 3072·h, Q, K, V and output h·h each, two products of one token, head."""
    config = load_recipe("document", {"model.mlp.hidden": 64}).run_config("mlp", "multi_head", 0)
    want = 2 * (3072 * 64 + 4 * 64 * 64 + 2 * 64 + 2 * 64 * 64 + 64 * 10)
    assert forward_flops(build_model(config, 10)) == want


def attention_flops(name, **options):
    """Of the attention in a CNN on 64 cells of width 16: what it adds to the control, less Q, K, V
    and output."""
    overrides = {f"attention.{name}.cnn.{key}": value for key, value in options.items()}
    recipe = load_recipe("fair", {**SMALL, **overrides})
    with_it, without = (
        forward_flops(build_model(recipe.run_config("cnn", a, 0), 10)) for a in (name, "none")
    )
    return with_it - without - 2 * 64 * 4 * 16 * 16


def test_flops_of_the_kernels():
    """By hand, per pair of tokens 2·(D + Dv) over the heads: 4·C."""
    pairs = 4 * 16
    assert attention_flops("multi_head") == 64 * 64 * pairs
    assert attention_flops("local", window_size=2, two_dimensional=False) == (64 * 3 - 2) * pairs
    # On the grid 8 + 2·7 pairs along each axis.
    assert attention_flops("local", window_size=2, two_dimensional=True) == 22 * 22 * pairs
    assert attention_flops("sparse", block_size=32) == 64 * 64 * pairs
    # 16 blocks of 4: two that see all, fourteen that see 3 + 2 + 3, or 7 beside the edge.
    assert attention_flops("sparse", block_size=4) == (2 * 16 + 12 * 8 + 2 * 7) * 16 * pairs
    # 4 heads of D = 4.
    elu = {"feature_map": "elu1", "num_heads": 4}
    assert attention_flops("linear", **elu) == 64 * 4 * 4 * 4 * 4
    assert attention_flops("performer", num_features=8, num_heads=4) == 64 * 4 * 4 * 8 * 8


def test_every_op_has_a_formula():
    assert all(callable(op.flops) for op in OPS.values())
