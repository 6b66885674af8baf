"""Corruptions, attacks and calibration against what is known of them; what a run keeps of them."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tab.analysis import attacks, corruptions, robustness
from tab.analysis.attacks import EPSILON, attacked, fgsm, pgd
from tab.analysis.corruptions import OFFICIAL, OWN, cifar10c, cifar101, corrupt
from tab.analysis.robustness import FILE, NOISE, Options, calibration_error, instead, measure, read
from tab.compare.runs import trained_runs
from tab.data.batches import Batches
from tab.data.cifar import CLASSES
from tab.data.load import Dataset, Split, load_dataset
from tab.layers import attention_names
from tab.models.image_model import build_model
from tab.recipe.recipe import load_recipe
from tab.train.loop import train
from tab.train.weights import FILE as weights_file
from tab.train.weights import load_weights, save_weights

TINY = {
    **{"train.epochs": 1, "train.batch_size": 20, "data.images": 60, "data.validation": 20},
    **{"model.mlp.hidden": 8, "model.mlp.tokens": 4, "attention.multi_head.num_heads": 2},
}


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (12, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte()


# --- corruptions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OWN)
def test_severities_grow_and_repeat(kind, images):
    made = [corrupt(images, kind, severity) for severity in range(1, 6)]
    assert all(x.dtype == torch.uint8 and x.shape == images.shape for x in made)
    moved = [(x.float() - images.float()).abs().mean().item() for x in made]
    assert moved == sorted(set(moved)) and moved[0] > 1
    assert torch.equal(corrupt(images, kind, 3), made[2])


def test_corruptions_are_what_they_say(images):
    flat = torch.full((2, 32, 32, 3), 100, dtype=torch.uint8)
    for kind in ("blur", "contrast", "pixelate"):
        assert torch.equal(corrupt(flat, kind, 5), flat)
    assert (corrupt(flat, "brightness", 2) == round(100 + 0.2 * 255)).all()
    noise = (corrupt(flat, "noise", 1).float() - 100).std()
    assert noise == pytest.approx(0.04 * 255, rel=0.05)
    assert not torch.equal(corrupt(flat, "noise", 1), corrupt(flat, "noise", 1, seed=1))
    cells = corrupt(images, "pixelate", 5).unflatten(1, (8, 4)).unflatten(3, (8, 4))
    assert (cells == cells[:, :, :1, :, :1]).all()
    x = images.float()
    want = x.mean((1, 2), keepdim=True) * 0.5 + x * 0.5
    assert (corrupt(images, "contrast", 2).float() - want).abs().max() <= 0.51


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """Two images a severity; each image is filled with its place."""
    folder, place = tmp_path_factory.mktemp("cifar10c"), np.arange(10, dtype=np.uint8)
    for name in OFFICIAL:
        np.save(
            folder / f"{name}.npy", np.broadcast_to(place[:, None, None, None], (10, 32, 32, 3))
        )
    np.save(folder / "labels.npy", place)
    np.save(folder / "cifar10.1_v6_data.npy", np.zeros((3, 32, 32, 3), np.uint8))
    np.save(folder / "cifar10.1_v6_labels.npy", np.array([1, 2, 3]))
    return folder


@pytest.fixture(scope="module")
def cifar() -> Dataset:
    split = Split(torch.zeros(10, 32, 32, 3, dtype=torch.uint8), torch.arange(10))
    return Dataset("cifar10", CLASSES, split, split, "made for tests", "0")


def test_official_arrays_are_cut_by_severity(official, cifar):
    corruptions.check_cifar10c(official, cifar)
    split = cifar10c(official, "fog", 4)
    assert split.labels.tolist() == [6, 7] and split.images[:, 0, 0, 0].tolist() == [6, 7]
    version, split = cifar101(official, cifar)
    assert version == "v6" and split.labels.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("fog.npy", None, "fog.npy is missing"),
        ("fog.npy", b"\x93NUMPY cut", "fog.npy is no whole array"),
        ("fog.npy", np.zeros((10, 3, 32, 32), np.uint8), "not uint8"),
        ("fog.npy", np.zeros((10, 32, 32, 3)), "not uint8"),
        ("fog.npy", np.zeros((9, 32, 32, 3), np.uint8), "9 images and labels.npy 10"),
        ("labels.npy", np.array([{}] * 10, dtype=object), "labels.npy is no whole array"),
        ("labels.npy", np.full(10, 10), "labels 10 … 10, not 0 … 9"),
    ],
)
def test_damaged_official_files_are_named(name, content, message, official, cifar, tmp_path):
    for path in official.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / name).unlink()
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        np.save(tmp_path / name, content, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        corruptions.check_cifar10c(tmp_path, cifar)


def test_official_files_are_for_cifar10(official, cifar, tmp_path):
    other = dataclasses.replace(cifar, classes=tuple("abcdefghij"))
    for check in (corruptions.check_cifar10c, cifar101):
        with pytest.raises(ValueError, match="has CIFAR-10's classes"):
            check(official, other)
    with pytest.raises(ValueError, match=r"has no cifar10.1_v6_data.npy"):
        cifar101(tmp_path, cifar)


# --- attacks --------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Logits (−s, s), s = w·x on the normalised image: an L∞ attack moves s by ε‖w‖₁ at most."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        s = (x * self.weight).sum((1, 2, 3))
        return torch.stack([-s, s], 1)


@pytest.fixture(scope="module")
def linear():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(64, 192, (200, 32, 32, 3), generator=generator).byte()
    weight = 0.1 * torch.randn(3, 32, 32, generator=generator)  # far from saturation
    mean, std = torch.tensor([127.5] * 3), torch.tensor([127.5] * 3)
    s = (images.permute(0, 3, 1, 2).float() - 127.5) / 127.5 * weight
    margin = s.sum((1, 2, 3))
    test = Batches(Split(images, (margin > 0).long()), batch_size=64, mean=mean, std=std)
    return Linear(weight), test, margin


def test_attacks_on_a_linear_model_do_what_is_possible(linear, monkeypatch):
    model, test, margin = linear
    for epsilon in (1 / 255, 2 / 255):
        monkeypatch.setattr(attacks, "EPSILON", epsilon)
        monkeypatch.setattr(attacks.fgsm, "__defaults__", (epsilon,))
        monkeypatch.setattr(attacks.pgd, "__defaults__", (epsilon,))
        found = attacked(model, test, 1000)
        # In units of the input ε is 2ε of the normalised one.
        left = (margin.abs() > 2 * epsilon * model.weight.abs().sum()).float().mean().item()
        assert found["fgsm"] == found["pgd"] == pytest.approx(left, abs=1e-6)
        assert found["clean"] == 1.0 and found["large"] == 0.0 and found["images"] == 200
        assert found["random"] > found["fgsm"] and found["suspicions"] == []
    assert 0 < left < 1
    assert attacked(model, test, 50)["images"] == 50


def test_attacks_stay_in_the_ball_and_in_the_pixels(generator):
    x, y = torch.rand(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 0, 1])
    model = Linear(torch.randn(3, 8, 8, generator=generator))
    for moved in (fgsm(model, x, y), pgd(model, x, y, generator=generator)):
        assert (moved - x).abs().max() <= EPSILON + 1e-6
        assert moved.min() >= 0 and moved.max() <= 1
    assert not pgd(model, x, y, steps=0, generator=generator).equal(x)  # it starts at random


def test_masked_gradients_are_seen(linear):
    """A model that rounds its input has no gradient, one that is too sure has none in float32:
    attacks fail, and that is said."""

    class Rounds(Linear):
        def forward(self, x):
            return super().forward((x * 4).round() / 4)

    model, test, _ = linear
    found = attacked(Rounds(model.weight), test, 50)
    assert found["zero_gradients"] == 1.0
    assert {"gradients vanish", "an attack without a bound fails"} <= set(found["suspicions"])
    sure = attacked(Linear(1000 * model.weight), test, 50)
    assert "gradients vanish" in sure["suspicions"]


@pytest.mark.parametrize("attention", attention_names())
def test_every_attention_passes_gradients_to_the_image(attention, generator):
    recipe = load_recipe("quick", TINY | {"model.mlp.hidden": 16, "model.mlp.block": "replace"})
    model = build_model(recipe.run_config("mlp", attention, 0), 10).eval().requires_grad_(False)
    x, y = torch.rand(2, 3, 32, 32, generator=generator), torch.tensor([0, 1])
    assert (attacks.gradient(model, x, y).flatten(1).abs().amax(1) > 0).all()


# --- calibration ----------------------------------------------------------------------------------


def test_calibration_error_by_hand():
    confidence = np.array([0.95, 0.95, 0.55, 0.55, 1.0])
    right = np.array([True, False, True, True, True])
    # Bins of a tenth: (0.9, 1.0] has 2 of 3 right at mean 2.9/3, (0.5, 0.6] 2 of 2 at 0.55.
    assert calibration_error(confidence, right, 10) == pytest.approx((0.9 + 0.9) / 5)
    sure = np.random.default_rng(0).uniform(0.3, 1, 100_000)
    assert calibration_error(sure, np.random.default_rng(1).random(100_000) < sure) < 0.01


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("shapes:100/20")


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "mlp-multi_head-s0"
    train(load_recipe("quick", TINY).run_config("mlp", "multi_head", 0), dataset, folder)
    return folder


def test_a_run_keeps_what_was_measured(trained, dataset):
    assert set(measure(trained, dataset, None)) == {"noise"}
    seen = []

    def stop(done, total, name):
        seen.append(name)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(trained, dataset, Options(images=10), progress=stop)
    assert set(read(trained)) == {"noise", "calibration", "attacks"}
    found = measure(trained, dataset, Options(10), progress=lambda i, n, name: seen.append(name))
    assert len(seen) == 2 + 1 + 2 + len(OWN)  # nothing twice, but for what was cut off
    own = (f"own/{kind}" for kind in OWN)
    assert set(found) == {"noise", "calibration", "attacks", "pgd", "cache", *own}
    assert found == read(trained) and len(found["own/blur"]["accuracy"]) == 5
    clean = json.loads((trained / "run.json").read_text())["summary"]["final_test_accuracy"]
    assert found["noise"]["accuracy"][0] == pytest.approx(clean)
    measure(trained, dataset, Options(10), progress=lambda *_: pytest.fail("measured again"))
    again = measure(trained, dataset, Options(12))  # other settings
    assert again["attacks"]["images"] == 12 and again["own/blur"] == found["own/blur"]
    assert trained_runs(trained) == ([trained], "shapes:100/20")


def test_other_images_are_normalised_as_the_test_set(dataset):
    test = Batches(dataset.test, batch_size=7, mean=[120.0, 110, 100], std=[60.0, 50, 40])
    pairs = zip(instead(test, dataset.test).epoch(0), test.epoch(0), strict=True)
    assert all(torch.allclose(a, b) and torch.equal(y, z) for (a, y), (b, z) in pairs)


def test_official_sets_on_a_run(official, cifar, tmp_path):
    config = load_recipe("quick", TINY | {"train.batch_size": 5, "data.validation": 0,
        "data.images": 0, "evaluate.split": "test"}).run_config("mlp", "none", 0)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (10, 32, 32, 3), generator=generator).byte()
    cifar = dataclasses.replace(cifar, train=Split(images, torch.arange(10)))
    train(config, cifar, tmp_path / "run")
    found = measure(tmp_path / "run", cifar, Options(10, official, official))
    assert {f"cifar10c/{name}" for name in OFFICIAL} | {"cifar10.1"} <= set(found)
    assert "own/blur" not in found and found["cifar10.1"]["images"] == 3


def test_what_cannot_be_measured(trained, dataset, tmp_path):
    other = dataclasses.replace(dataset, fingerprint="other")
    with pytest.raises(ValueError, match=r"was trained on shapes:100/20 .* not on .*\(other\)"):
        measure(trained, other, Options(11))
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ValueError, match=r"robustness.json is damaged.*remove it, and measure"):
        read(tmp_path)
    (tmp_path / FILE).write_text('{"own/blur": {"accuracy": 0.5}}')
    with pytest.raises(ValueError, match=r"own/blur: accuracy = 0.5.*remove it, and measure"):
        read(tmp_path)
    with pytest.raises(ValueError, match="holds no comparison"):
        trained_runs(tmp_path)


def test_what_was_measured_on_something_else_is_measured_again(official, cifar, tmp_path):
    config = load_recipe("quick", TINY | {"train.batch_size": 5, "data.validation": 0,
        "data.images": 0, "evaluate.split": "test"}).run_config("mlp", "none", 0)  # fmt: skip
    run, options = tmp_path / "run", Options(10, tmp_path / "official", None)
    images = torch.randint(256, (10, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte()
    cifar = dataclasses.replace(cifar, train=Split(images, torch.arange(10)))
    shutil.copytree(official, tmp_path / "official")
    train(config, cifar, run)
    first = measure(run, cifar, options)
    assert first["noise"]["settings"]["data"] == cifar.fingerprint
    seen = []
    again = lambda: measure(run, cifar, options, progress=lambda i, n, s: seen.append(s))  # noqa: E731
    assert again() == first and not seen
    # Other files in the same folder, as a process of tomorrow finds them.
    fog = np.full((10, 32, 32, 3), 255, np.uint8)
    np.save(tmp_path / "official" / "fog.npy", fog)
    robustness.official_sum.cache_clear()
    again()
    assert [s.split()[-1] for s in seen] == ["cifar10c/fog"]
    # Other weights in the same directory: nothing of the old ones is left.
    weights, about = load_weights(run / weights_file, "")
    save_weights(run / weights_file, {k: v + 0.1 for k, v in weights.items()}, about)
    seen.clear()
    assert set(again()) == {s.split()[-1] for s in seen}


def test_a_file_of_before_is_read_and_kept(trained, dataset, tmp_path):
    """It states neither data nor weights; what it does state is compared."""
    run = tmp_path / trained.name
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns(FILE))
    noise = {"settings": {"sigma": list(NOISE), "seed": 0}, "accuracy": [0.25] * 6, "images": 20}
    (run / FILE).write_text(json.dumps({"noise": noise, "cifar10c/fog": {"settings": {},
                            "accuracy": [0.5] * 5}}))  # fmt: skip
    assert measure(run, dataset, None)["noise"]["accuracy"] == [0.25] * 6
    other = dataclasses.replace(dataset, fingerprint="other")
    with pytest.raises(ValueError, match="was trained on"):  # also where nothing is to be measured
        measure(run, other, None)
