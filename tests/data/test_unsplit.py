"""data.test_share: sets without test images, of which a share of each class is tested on."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from small_cli import SMALL, flat, tab
from small_pictures import pack, pack_zip

from tab.data.held_out import draw_test
from tab.data.load import load_dataset, loader
from tab.recipe.recipe import load_recipe
from tab.run_config import RunConfig
from tab.train import train

SIZES = {"ant": 10, "bee": 20, "train": 5}  # a class may have the name of a folder that is none


def build(folder):
    """Class folders; each picture has a colour of its own, whose red is its class."""
    for label, (name, count) in enumerate(SIZES.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (32, 32), (90 * label, 10 * i, 0)).save(folder / f"{name}/{i}.png")
    (folder / "README.txt").write_text("pictures of insects")
    return folder


@pytest.fixture
def folder(tmp_path):
    return build(tmp_path / "pics")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


def colours(split) -> set:
    return {tuple(image[0, 0].tolist()) for image in split.images}


def test_a_share_of_each_class_is_tested_on(folder, root):
    data = load_dataset(folder, test_share=0.2, root=root)
    assert data.classes == tuple(SIZES) and data.test_share == 0.2
    assert np.bincount(data.test.labels).tolist() == [2, 4, 1]
    assert np.bincount(data.train.labels).tolist() == [8, 16, 4]
    for split in (data.train, data.test):
        assert (split.images[:, 0, 0, 0] == 90 * split.labels).all()
    assert not colours(data.train) & colours(data.test)
    assert len(colours(data.train) | colours(data.test)) == 35
    assert "28 train, 7 test" in data.note and "skipped 1 file" in data.note
    assert "of its 35 images 7 were drawn to test on (data.test_share = 0.2)" in data.note


def test_all_ways_to_hold_the_folders_are_one_set(folder, root, tmp_path):
    """At the top, within another folder, in an archive, as `train` alone."""
    first = load_dataset(folder, test_share=0.2, root=root)
    below = tmp_path / "below/pictures/all"
    shutil.copytree(folder, below)
    (tmp_path / "below/LICENSE").write_text("free")
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone / "train")
    packed = pack(folder, tmp_path / "a.tar.gz", "w:gz"), pack(alone, tmp_path / "b.tar", "w")
    for other in (tmp_path / "below", alone, *packed, pack_zip(folder, tmp_path / "a.zip")):
        assert load_dataset(other, test_share=0.2, root=root).fingerprint == first.fingerprint


def test_the_draw_is_kept_and_each_share_has_its_cache(folder, root):
    first = load_dataset(folder, test_share=0.2, root=root)
    half = load_dataset(folder, test_share=0.5, root=root)
    assert len(half.test) == 18 and half.fingerprint != first.fingerprint
    for data in (first, half):
        again = load_dataset(folder, test_share=data.test_share, root=root)
        assert (again.fingerprint, again.test_share) == (data.fingerprint, data.test_share)
        assert loader(data, str(folder), root=root)().fingerprint == data.fingerprint
    assert len(list((root / "cache").iterdir())) == 2
    shutil.rmtree(root)
    assert load_dataset(folder, test_share=0.2, root=root).fingerprint == first.fingerprint


def test_what_is_missing_is_asked_for(folder, root):
    said = (
        r"pics \(it holds README.txt, ant, bee, train\) has nothing to test on: give --set data\."
    )
    with pytest.raises(ValueError, match=said):
        load_dataset(folder, root=root)
    (folder / "ant/9.png").rename(folder / "9.png")
    with pytest.raises(ValueError, match=r"9\.png is in no class folder"):
        load_dataset(folder, test_share=0.2, root=root)
    (folder / "9.png").unlink()
    (folder / "wasp").mkdir()
    with pytest.raises(ValueError, match="wasp is empty"):
        load_dataset(folder, test_share=0.2, root=root)
    Image.new("RGB", (32, 32)).save(folder / "wasp/0.png")
    with pytest.raises(ValueError, match="1 of 4 classes have a single image"):
        load_dataset(folder, test_share=0.2, root=root)
    assert not (root / "cache").exists()


def test_a_set_with_test_images_refuses_a_share(folder, root):
    (folder.parent / "both").mkdir()
    for split in ("train", "val"):
        shutil.copytree(folder, folder.parent / "both" / split)
    for spec in ("shapes:20/10", "recall:16:40/60", "cifar10", folder.parent / "both"):
        with pytest.raises(
            ValueError, match=r"test images of its own, and data\.test_share = 0\.2"
        ):
            load_dataset(spec, test_share=0.2, root=root)
    with pytest.raises(ValueError, match=r"give a share from 0 to 0\.9"):
        load_dataset(folder, test_share=1.5, root=root)
    with pytest.raises(ValueError, match=r"data\.test_share = 0\.95: must be from 0 to 0\.9"):
        load_recipe("fair", {"data.test_share": 0.95})


@pytest.mark.parametrize("share", [0.001, 0.5, 0.9])
def test_each_class_is_on_both_sides(share):
    labels = np.repeat(np.arange(4), [2, 3, 50, 2])
    images = np.arange(57, dtype=np.uint8).reshape(57, 1, 1, 1).repeat(3, 3)
    train, test, _ = draw_test(images, labels, share, "")
    assert set(train[1]) == set(test[1]) == {0, 1, 2, 3}
    assert sorted([*train[0][:, 0, 0, 0], *test[0][:, 0, 0, 0]]) == list(range(57))
    assert len(test[1]) == {0.001: 4, 0.5: 28, 0.9: 51}[share]


def test_a_run_needs_the_share_of_its_recipe(folder, root, tmp_path):
    config = load_recipe("fair", {"data.test_share": 0.2}).run_config("mlp", "none", 0)
    assert RunConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"read with test_share=0\.5, and data\.test_share = 0\.2"):
        train(config, load_dataset(folder, test_share=0.5, root=root), tmp_path / "run")


def test_commands_take_it_and_results_keep_it(folder, tmp_path, monkeypatch):
    """From the key that the error names to a comparison that is resumed, reported and measured."""
    monkeypatch.setenv("TAB_DATA", str(tmp_path / "data"))
    result = tab("data", folder)
    assert result.exit_code == 2 and "--set data.test_share=0.2 to draw a fifth" in flat(
        result.stderr
    )
    result = tab("data", folder, "--set", "data.test_share=0.2")
    assert result.exit_code == 0 and "28 train, 7 test" in flat(result.stdout)
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("Next: ")]
    assert "--set=data.test_share=0.2" in line

    out = tmp_path / "out"
    small = [word for word in SMALL if word not in ("--data", "shapes:100/20")]
    small = [word.replace("=20", "=4") for word in small]
    words = ("--models", "mlp", "--attentions", "none", "--set", "data.test_share=0.2", *small)
    result = tab("compare", *words, "--data", folder, "--out", out)
    assert result.exit_code == 0, result.output
    before = json.loads((out / "runs/mlp-none-s0/run.json").read_text())
    assert (
        before["config"]["data"]["test_share"] == 0.2 and "7 were drawn" in before["data"]["note"]
    )
    (out / "runs/mlp-none-s0/run.json").unlink()
    for words in (("compare", "--resume", out), ("report", out),
                  ("robustness", out, "--images", 4)):  # fmt: skip
        result = tab(*words)
        assert result.exit_code == 0, result.output
    after = json.loads((out / "runs/mlp-none-s0/run.json").read_text())
    assert after["data"] == before["data"]
