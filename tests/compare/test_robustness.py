"""What a run keeps of its robustness, and when it is measured again; calibration."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from tab.analysis import robustness
from tab.analysis.corruptions import OFFICIAL, OWN
from tab.analysis.robustness import NOISE, Options, calibration_error, instead, measure
from tab.analysis.robustness_file import FILE, read
from tab.compare.runs import trained_runs
from tab.data.batches import Batches
from tab.data.load import Split, load_dataset
from tab.recipe.recipe import load_recipe
from tab.train.loop import train
from tab.train.weights import FILE as weights_file
from tab.train.weights import load_weights, save_weights

TINY = {
    **{"train.epochs": 1, "train.batch_size": 20, "data.images": 60, "data.validation": 20},
    **{"model.mlp.hidden": 8, "model.mlp.tokens": 4, "attention.multi_head.num_heads": 2},
}


def test_calibration_error_by_hand():
    confidence = np.array([0.95, 0.95, 0.55, 0.55, 1.0])
    right = np.array([True, False, True, True, True])
    # Bins of a tenth: (0.9, 1.0] has 2 of 3 right at mean 2.9/3, (0.5, 0.6] 2 of 2 at 0.55.
    assert calibration_error(confidence, right, 10) == pytest.approx((0.9 + 0.9) / 5)
    sure = np.random.default_rng(0).uniform(0.3, 1, 100_000)
    assert calibration_error(sure, np.random.default_rng(1).random(100_000) < sure) < 0.01


def test_mirrored_copies_count_as_much_as_the_images(dataset):
    """Each image weighs as much as its mirror image, so a mirrored set scores the same; a model
    that answers by the left half alone does not see the two alike."""
    weight = torch.randn(3 * 32 * 16, 10, generator=torch.Generator().manual_seed(0))

    def model(x):  # (B, 3, 32, 32)
        return x[..., :16].flatten(1) @ weight

    test = Batches(dataset.test, batch_size=7, mean=[120.0, 110, 100], std=[60.0, 50, 40])
    mirrored = instead(test, Split(dataset.test.images.flip(2), dataset.test.labels))
    logits = torch.cat([(model(x) + model(x.flip(3))) / 2 for x, _ in test.epoch(0)])
    by_hand = (logits.argmax(1) == dataset.test.labels).float().mean().item()
    found = [robustness._mirrored(model, each) for each in (test, mirrored)]
    assert found[0] == found[1] == {"accuracy": pytest.approx(by_hand), "images": 20}
    assert len({robustness.accuracy(model, each) for each in (test, mirrored)} | {by_hand}) > 1


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
    assert set(read(trained)) == {"noise", "calibration", "mirrored"}
    found = measure(trained, dataset, Options(10), progress=lambda i, n, name: seen.append(name))
    assert len(seen) == 2 + 1 + 3 + len(OWN)  # nothing twice, but for what was cut off
    own = (f"own/{kind}" for kind in OWN)
    assert set(found) == {"noise", "calibration", "mirrored", "attacks", "pgd", "cache", *own}
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
