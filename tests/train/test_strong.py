"""What the recipe resnet9 adds: alternating flips, cutout, whitening, averaged weights."""

import pytest
import torch

from tab.data.batches import Batches
from tab.data.load import Split, load_dataset
from tab.models.image_model import build_model
from tab.recipe.recipe import load_recipe
from tab.train.loop import load_model, train
from tab.train.steps import Steps
from tab.train.together import train_seeds

SMALL = {
    **{"model.resnet9.hidden": 16, "model.resnet9.channels": 4, "model.resnet9.match": ""},
    **{"data.validation": 10, "train.batch_size": 8, "train.epochs": 2},
}


def config_of(seed=0, **changes):
    given = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    return load_recipe("resnet9", given).run_config("resnet9", "none", seed)


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("shapes:50/20")


def batches_of(dataset, **options):
    given = {"mean": torch.zeros(3), "std": torch.ones(3), "batch_size": 50, **options}
    return Batches(dataset.train, **given)


def images(batches, epoch):
    return torch.cat([x for x, _ in batches.epoch(epoch)])


def test_flips_alternate(dataset):
    plain = images(batches_of(dataset), 0)
    batches = batches_of(dataset, flip=True, alternating=True)
    first, second, third = (images(batches, epoch) for epoch in range(3))
    mirrored = [not torch.equal(a, b) for a, b in zip(first, plain, strict=True)]
    assert 10 < sum(mirrored) < 40
    assert torch.equal(second, first.flip(-1)) and torch.equal(third, first)


def test_a_square_is_cut_out(dataset):
    """Of each image one, of the mean colour; elsewhere in another epoch, and always the same."""
    bright = Split(torch.full_like(dataset.train.images, 9), dataset.train.labels)
    given = {"mean": torch.zeros(3), "std": torch.ones(3), "batch_size": 50}
    batches = Batches(bright, cutout=5, **given)
    x = images(batches, 0)
    blank = (x == 0).all(1)  # (B, rows, cols)
    assert torch.equal(blank, (x == 0).any(1)) and (blank.sum((1, 2)) == 25).all()
    rows, cols = blank.any(2), blank.any(1)
    assert (rows.sum(1) == 5).all() and (cols.sum(1) == 5).all()
    assert len({tuple(m.flatten().tolist()) for m in blank}) > 40  # of 50 images
    assert torch.equal(images(batches, 0), x) and not torch.equal(images(batches, 1), x)
    assert rows.any(0).all() and cols.any(0).all()  # every place is cut in some image
    with pytest.raises(ValueError, match="cutout 33"):
        Batches(bright, cutout=33, **given)


def test_the_first_layer_whitens(dataset):
    """Its outputs on patches of other images alike: uncorrelated, of variance λ/(λ + ε)."""
    net = build_model(config_of(), 10)
    x = images(batches_of(dataset), 0) / 60 - 2
    net.backbone.see(x)
    layer = net.backbone.convolutions[0]
    assert not layer.weight.requires_grad
    out = torch.nn.functional.conv2d(x.double(), layer.weight.double())  # whole patches
    found = out.permute(1, 0, 2, 3).flatten(1).cov()
    assert (found - torch.diag(found.diag())).abs().max() < 1e-3
    assert found.diag().max() < 1.001 and found.diag().median() > 0.5


def test_training_leaves_it_and_a_resumed_run_has_it(dataset, tmp_path, one_thread):
    """With all of the recipe at once, to the bit; what is kept is the average of the weights."""
    config = config_of(data__cutout=8)
    whole = train(config, dataset, tmp_path / "whole")
    train(config, dataset, tmp_path / "parts", stop_after=1)
    parts = train(config, dataset, tmp_path / "parts", resume=True)
    for a, b in zip(whole.rows, parts.rows, strict=True):
        assert a["train_loss"] == b["train_loss"] and a["test_loss"] == b["test_loss"]
    one, other = load_model(tmp_path / "whole"), load_model(tmp_path / "parts")
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    first = one.backbone.convolutions[0].weight
    assert not torch.equal(first, build_model(config, 10).backbone.convolutions[0].weight)


def test_the_average_is_what_is_scored():
    """w̄ after step t: min(ema, t/(t + 9)) of what it was and the rest of w; training goes on from w
    itself."""
    config = config_of(train__ema=0.2)
    steps = Steps(build_model(config, 10), config.train, 10, torch.device("cpu"))
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    weight = steps.model.head.layers[0].weight
    wanted = None
    for t in range(1, 5):
        steps.learn([(x, y)])
        keep = min(0.2, t / (t + 9))
        own = weight.detach().clone()
        wanted = own if wanted is None else keep * wanted + (1 - keep) * own
        torch.testing.assert_close(steps.average["head.layers.0.weight"], wanted)
    averaged, _ = steps.score([(x, y)])
    assert torch.equal(weight, own)
    steps.average = {}
    assert steps.score([(x, y)])[0] != averaged


def test_only_what_is_learned_is_averaged(dataset, tmp_path, one_thread):
    """The mean of two random projections is no random projection."""
    changes = {"attention.performer.redraw_interval": 1, "attention.performer.num_features": 4}
    changes |= {"attention.performer.num_heads": 4}  # of width 4: the rows are orthogonal
    recipe = load_recipe("resnet9", {**SMALL, "train.ema": 0.5, "train.epochs": 1, **changes})
    train(recipe.run_config("resnet9", "performer", 0), dataset, tmp_path / "run")
    layer = load_model(tmp_path / "run").attention
    kept = layer.projection.clone()
    layer._draw(int(layer.steps))
    assert layer.steps > 3 and torch.equal(layer.projection, kept)


def test_what_does_not_go_together_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="one at a time"):
        train_seeds([config_of(0), config_of(1)], dataset, [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match=r"data\.flip=true"):
        config_of(data__flip=False)
