"""data.size and data.fit: images of any size, and all that follows from it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from pictures import dots as dots
from PIL import Image
from small_cli import flat, tab
from small_pictures import build

from tab import load_model, load_study
from tab.data.decode import squared
from tab.data.load import load_dataset, loader
from tab.models.flops import flops_on, forward_flops
from tab.models.image_model import build_model, model_names
from tab.recipe.recipe import load_recipe
from tab.recipe.size_matching import parameters_of
from tab.run_config import RunConfig

SMALL = [
    *("--recipe", "quick", "--data", "shapes:100/20", "--epochs", "1", "--device", "cpu"),
    *("--set", "data.images=60", "--set", "data.validation=20", "--set", "train.batch_size=20"),
]


def sized(model: str, size: int, attention: str = "none", recipe: str = "fair") -> RunConfig:
    return load_recipe(recipe, {"data.size": size}).run_config(model, attention, 0)


def test_the_centre_is_cut_out_or_the_sides_are_stretched():
    """Three stripes of 40, 64 and 40 pixels: of the middle one alone, or of all."""
    wide = Image.new("RGB", (144, 64), "red")
    wide.paste("lime", (40, 0, 104, 64))
    cut, stretched = (np.asarray(squared(wide, 48, fit)) for fit in ("crop", "stretch"))
    assert cut.shape == stretched.shape == (48, 48, 3)
    assert (cut[:, 2:-2] == (0, 255, 0)).all()  # bicubic: what lies beside reaches two pixels far
    assert tuple(stretched[24, 2]) == (255, 0, 0) and tuple(stretched[24, 24]) == (0, 255, 0)
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    assert (np.asarray(squared(tall, 48, "crop"))[2:-2] == (0, 255, 0)).all()


def test_old_results_mean_stretched_pictures_of_32():
    config = sized("mlp", 32)
    old = config.to_dict()
    del old["data"]["size"], old["data"]["fit"]
    assert RunConfig.from_dict(old) == config
    assert (config.data.size, config.data.fit) == (32, "stretch")
    assert sized("mlp", 64).data.fit == "crop"
    chosen = load_recipe("fair", {"data.fit": "crop"}).run_config("mlp", "none", 0)
    assert chosen.data.fit == "crop" and RunConfig.from_dict(chosen.to_dict()) == chosen


@pytest.mark.parametrize("size", [0, 30, 2000])
def test_sizes_that_no_model_has(size):
    with pytest.raises(ValueError, match=r"data\.size"):
        sized("cnn", size)


@pytest.mark.parametrize("model", model_names())
@pytest.mark.parametrize("size", [16, 48])
def test_models_take_images_of_the_size(model, size):
    config = sized(model, size, "multi_head", "quick")
    net = build_model(config, 10).eval()
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert net(x).shape == (2, 10) and net.tokens(x).shape[1] == config.tokens
    usual = dataclasses.replace(config, data=dataclasses.replace(config.data, size=32))
    more = 1 if model == "mlp" else size**2 / 32**2
    assert config.tokens == usual.tokens * more
    assert forward_flops(net) == flops_on(net, x[:1])


def test_sizes_are_matched_at_the_size():
    """The reference grows with the image, and the others with it."""
    wanted = parameters_of(sized("mlp", 64, "multi_head"))
    assert wanted > 1.5 * parameters_of(sized("mlp", 32, "multi_head"))
    assert parameters_of(sized("mlp", 64, "linear")) == pytest.approx(wanted, rel=0.02)


def test_every_source_is_read_at_the_size(tmp_path):
    folder = build(tmp_path / "set")
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("lime", (30, 0, 60, 30))
    wide.save(folder / "train/apple/wide.png")
    found = {
        (size, fit): load_dataset(folder, size=size, fit=fit, root=tmp_path)
        for size, fit in ((32, "auto"), (32, "crop"), (48, "auto"), (48, "stretch"))
    }
    assert {key: data.size for key, data in found.items()} == {key: key[0] for key in found}
    assert len({data.fingerprint for data in found.values()}) == 4
    assert "resized to 48×48 after cutting out their centres" in found[48, "auto"].note
    for key, data in found.items():  # each has a cache of its own, which gives the same
        again = load_dataset(folder, size=key[0], fit=key[1], root=tmp_path)
        assert (again.fingerprint, again.fit) == (data.fingerprint, data.fit)
    assert len(list((tmp_path / "cache").iterdir())) == 4
    drawn = load_dataset("shapes:20/10", size=64)
    assert drawn.size == 64 and drawn.note.endswith("resized to 64×64")
    assert drawn.fingerprint != load_dataset("shapes:20/10").fingerprint
    load = loader(drawn, "shapes:20/10")
    assert load().fingerprint == drawn.fingerprint  # another process reads the same


def test_a_comparison_at_another_size_resumes_and_is_reported(tmp_path):
    out = tmp_path / "out"
    grid = ("--models", "vit", "--attentions", "none,linear", "--set", "data.size=16")
    ran = tab("compare", *grid, *SMALL, "--out", out)
    assert ran.exit_code == 0, ran.output
    run = out / "runs/vit-linear-s0"
    before = json.loads((run / "run.json").read_text())
    assert before["config"]["data"]["size"] == 16 and "16×16" in before["data"]["note"]
    (out / "runs/vit-none-s0/run.json").unlink()
    assert [run.status for run in load_study(out).resume(tell=None).runs] == ["done"] * 2
    assert tab("robustness", run, "--data", "shapes:100/20", "--images", 4).exit_code == 0
    assert load_model(run)(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


def test_images_of_another_size_than_the_recipe_says_are_refused(tmp_path):
    from tab.train import train

    with pytest.raises(ValueError, match=r"read with images of 32×32, and data\.size = 64"):
        train(sized("mlp", 64), load_dataset("shapes:100/20"), tmp_path / "run")
    recall = ("--recipe", "recall", "--data", "recall:64:200/50", "--set", "data.size=64")
    ran = tab("train", "tokens", "none", *recall, "--out", tmp_path / "tokens")
    assert ran.exit_code == 2 and "has no images: leave it out" in flat(ran.stderr)


def test_official_arrays_are_of_32(tmp_path):
    from tab.analysis.corruptions import check_cifar10c
    from tab.data.cifar import CLASSES

    data = dataclasses.replace(load_dataset("shapes:20/10", size=64), classes=CLASSES)
    with pytest.raises(ValueError, match=r"images of 32×32, and .* with 64×64"):
        check_cifar10c(tmp_path, data)
