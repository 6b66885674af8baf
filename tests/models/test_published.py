"""The recipe `published`: its models, its training and the fault in it."""

import pytest
import torch
from safetensors.torch import load_file

from tab.data.load import load_dataset
from tab.data.splits import split_batches
from tab.recipe.recipe import load_recipe
from tab.recipe.size_matching import parameters_of
from tab.train import checkpoint
from tab.train.loop import train
from tab.train.steps import Steps


@pytest.mark.parametrize(
    ("model", "attention", "width", "parameters"),
    [
        ("mlp", "none", 512, 3072 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10),
        ("mlp", "multi_head", 256, 3072 * 256 + 256 + 4 * 256**2 + 256 * 257 + 2570),
        ("mlp", "self", 256, 3072 * 256 + 256 + 3 * 256**2 + 256 * 257 + 2570),
        ("cnn", "none", 512, 27 * 128 + 256 + 9 * 128 * 512 + 1024 + 5130),
        ("cnn", "local", 512, 27 * 128 + 256 + 9 * 128 * 512 + 1024 + 5130 + 4 * 512**2),
        ("cnn", "linformer", 512, 599690 + 4 * 512**2 + 2 * 512 * 64),
        ("cnn", "kimi_k2", 256, 152394 + 4 * 256**2 + 256 * 32),
        ("cnn", "linear", 256, 152394 + 4 * 256**2 + 2 * 64 * 128),
    ],
)
def test_models_have_the_published_sizes(model, attention, width, parameters):
    config = load_recipe("published").run_config(model, attention, 0)
    assert config.model_options.hidden == width
    assert parameters_of(config) == parameters


def test_training_is_as_published():
    config = load_recipe("published").run_config("cnn", "performer", 0)
    train, data = config.train, config.data
    assert (train.lr, train.weight_decay, train.batch_size, train.epochs) == (1e-3, 0.01, 512, 100)
    assert (train.schedule, train.label_smoothing, train.amp) == ("constant", 0.0, False)
    assert (data.images, data.validation, data.translate, data.flip) == (0, 0, 0, False)
    assert data.drop_last and config.evaluate.split == "test"
    assert config.attention_options == {"num_heads": 8, "num_features": 64, "seed": 0}
    assert config.model_options.channels == config.model_options.hidden // 4 == 128


def test_each_set_is_normalised_by_its_own_statistics():
    dataset = load_dataset("shapes:120/40")
    options = {"train.batch_size": 50, "evaluate.batch_size": 40}
    config = load_recipe("published", options).run_config("mlp", "none", 0)
    batches, validation, test = split_batches(config, dataset, torch.device("cpu"))
    assert validation is None and batches.samples == 100  # the incomplete third batch is dropped
    x, _ = next(test.epoch(0))
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    assert (x.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_batch_norm_stands_still_after_the_first_epoch(tmp_path):
    dataset = load_dataset("shapes:60/20")
    small = {"train.batch_size": 20, "model.cnn.hidden": 8, "model.cnn.channels": 4}
    config = load_recipe("published", {**small, "train.epochs": 3}).run_config(
        "cnn", "multi_head", 0
    )
    seen = []

    def look(row):
        state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["model"]
        seen.append({k: v.clone() for k, v in state.items() if "running" in k or "1.weight" in k})

    train(config, dataset, tmp_path / "run", on_epoch=look, stop_after=2)
    train(config, dataset, tmp_path / "unbroken", stop_after=2)
    one, two = seen
    means = [k for k in one if "running_mean" in k]
    assert means and all(torch.equal(one[k], two[k]) for k in means)
    assert any(not torch.equal(one[k], two[k]) for k in one if k.endswith("weight"))
    # A resumed run is still past its first epoch.
    resumed = train(config, dataset, tmp_path / "run", resume=True)
    whole = train(config, dataset, tmp_path / "unbroken", resume=True)
    assert resumed.rows[-1]["test_loss"] == whole.rows[-1]["test_loss"]
    end = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(one[k], end[k]) for k in means)


def test_other_recipes_keep_train_mode():
    model = torch.nn.Sequential()
    model.attention = None
    steps = Steps.__new__(Steps)
    steps.model, steps.device = model, torch.device("cpu")
    steps.loss, steps.correct = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    steps.learn([])
    assert model.training
    steps.learn([], training=False)
    assert not model.training
