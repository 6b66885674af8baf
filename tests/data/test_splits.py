"""What a data set is: checks, statistics, held-out images."""

import shlex
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tab.cli.main import app
from tab.data import splits
from tab.data.load import Dataset, Split, hold_out, load_dataset
from tab.data.splits import split_batches
from tab.data.statistics import statistics
from tab.recipe.recipe import load_recipe, parse_override


def test_statistics_are_exact():
    images = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8)
    mean, std = statistics(torch.from_numpy(images))
    exact = images.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, exact.std((0, 1, 2)), rtol=1e-11)
    assert mean.dtype == std.dtype == torch.float64


def test_statistics_lose_no_digits_over_many_pixels():
    """51 million pixels a channel: a running float32 sum stops growing at 2²⁴ · 255."""
    images = torch.full((1, 1, 1, 3), 125, dtype=torch.uint8).expand(50_000, 32, 32, 3)
    mean, std = statistics(images)
    assert mean.tolist() == [125.0] * 3 and std.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 4, 4, 3), torch.zeros(0, 4, 4, 3).byte(), torch.zeros(2, 3, 4, 4).byte()],
)
def test_statistics_refuse_other_things(images):
    with pytest.raises(ValueError, match="statistics wants uint8"):
        statistics(images)


def test_hold_out_is_stratified_and_seeded():
    labels = torch.arange(5000) % 10
    train, validation = hold_out(labels, 500, seed=3)
    assert torch.bincount(labels[validation]).tolist() == [50] * 10
    assert sorted(torch.cat([train, validation]).tolist()) == list(range(5000))
    assert all(torch.equal(x, x.sort().values) for x in (train, validation))
    assert torch.equal(hold_out(labels, 500, seed=3)[1], validation)
    assert not torch.equal(hold_out(labels, 500, seed=4)[1], validation)


def test_hold_out_of_uneven_classes():
    labels = torch.tensor([0] * 70 + [1] * 25 + [3] * 5)  # class 2 has no image
    train, validation = hold_out(labels, 11, seed=0)
    # 7.7, 2.75 and 0.55: rounded down 7, 2, 0; the two left go to .75 and .7.
    assert torch.bincount(labels[validation], minlength=4).tolist() == [8, 3, 0, 0]
    assert len(train) == 89


@pytest.mark.parametrize("count", [0, -1, 10, 11])
def test_hold_out_refuses_bad_counts(count):
    with pytest.raises(ValueError, match=f"cannot hold out {count} of 10"):
        hold_out(torch.arange(10), count, seed=0)


LABELS = st.lists(st.integers(0, 8), min_size=2, max_size=60).map(torch.tensor)


@given(labels=LABELS, part=st.floats(0, 1), seed=st.integers(0, 3))
def test_hold_out_keeps_what_it_must(labels, part, seed):
    sizes, total = torch.bincount(labels), len(labels)
    classes = int((sizes > 0).sum())
    for least, most in (((0, 0), (1, total - 1)), ((1, 0), (1, total - classes)),
                        ((0, 1), (classes, total - 1))):  # fmt: skip
        count = round(most[0] + part * (most[1] - most[0]))
        if not most[0] <= count <= most[1]:
            with pytest.raises(ValueError, match="cannot hold out"):
                hold_out(labels, count, seed=seed, least=least)
            continue
        train, held = hold_out(labels, count, seed=seed, least=least)
        assert sorted([*train.tolist(), *held.tolist()]) == list(range(total))
        shares = torch.bincount(labels[held], minlength=len(sizes))
        assert int(shares.sum()) == count
        assert (sizes - shares >= sizes.clamp(max=least[0])).all()
        assert (shares >= sizes.clamp(max=least[1])).all()
        # Nothing is nearer to the exact shares: no image can move to a class that is owed more.
        owed = count * sizes / total - shares
        for a in range(len(sizes)):
            for b in range(len(sizes)):
                give = sizes[a] - shares[a] > least[0] and shares[b] > least[1]
                assert not give or owed[a] - owed[b] <= 1 + 1e-6 or sizes[a] == 0


def test_hold_out_of_rare_classes_leaves_each_one():
    labels = torch.tensor([0] * 9 + [1] + [2] + [3])
    train, validation = hold_out(labels, 8, seed=0, least=(1, 0))
    assert Counter(labels[train].tolist()) == {0: 1, 1: 1, 2: 1, 3: 1} and len(validation) == 8
    _, chosen = hold_out(labels, 4, seed=0, least=(0, 1))
    assert labels[chosen].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"9 of 12 images of 4 classes .*: give 0…8"):
        hold_out(labels, 9, seed=0, least=(1, 0))
    with pytest.raises(ValueError, match=r"3 of 12 images of 4 classes .*: give 4…12"):
        hold_out(labels, 3, seed=0, least=(0, 1))


def small(counts, **overrides):
    """A set with `counts` training images of each class and one for the test; its splits."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(labels), 32, 32, 3), generator=generator).byte()
    images[..., 2] = 0  # no blue anywhere
    test = Split(images[: len(counts)], torch.arange(len(counts)))
    names = tuple(f"c{i}" for i in range(len(counts)))
    dataset = Dataset("small", names, Split(images, labels), test, "", "")
    given = {"train.batch_size": 4, **{k.replace("_", ".", 1): v for k, v in overrides.items()}}
    config = load_recipe("fair", given).run_config("cnn", "none", 0)
    return split_batches(config, dataset, torch.device("cpu"))


def test_every_class_is_trained_on():
    train, validation, _ = small([20, 1, 1, 1], data_validation=15)
    assert set(train.labels[train.index].tolist()) == {0, 1, 2, 3} and len(validation.index) == 15
    train, *_ = small([40, 1, 1, 1], data_validation=20, data_images=6)
    assert Counter(train.labels[train.index].tolist()) == {0: 3, 1: 1, 2: 1, 3: 1}


def test_a_constant_channel_is_zero():
    train, validation, test = small([20, 20], data_validation=5, data_normalise="each")
    for batches in (train, validation, test):
        x, _ = next(iter(batches.epoch(0)))
        assert torch.isfinite(x).all() and (x[:, 2] == 0).all() and x[:, 0].std() > 0.5


@pytest.mark.parametrize(
    "counts, overrides, said",
    [
        (
            [9, 3],
            {},
            r"data.validation = 5000 .* at most 10 .*--set data.validation=1 .*sweep: --v",
        ),
        ([9, 3], {"data_validation": 11}, r"of the 12 of small, 2 classes, at most 10 can be"),
        ([1, 1], {"data_validation": 1}, r"add pictures, or give --set data.validation=0 --set ev"),
        (
            [9, 9, 9],
            {"data_validation": 1, "data_images": 2},
            r"data.images = 2 .* 3 classes of small: give --set data.images=3 or more",
        ),
        (
            [9, 9],
            {"data_validation": 8, "train_batch_size": 16},
            r"10 images, batch_size 16.*--set train.batch_size=10 or less, or --set data.drop_last",
        ),
    ],
)
def test_too_few_images_name_the_key(counts, overrides, said):
    with pytest.raises(ValueError, match=said):
        small(counts, **overrides)


@pytest.mark.parametrize(
    "spec, train, test",
    [("shapes:10/10", 10, 10), ("shapes:20/10", 20, 10), ("shapes:90/10", 90, 10),
     ("shapes:400/10", 400, 10), ("shapes:5000/10", 5000, 10), ("shapes:6000/10", 6000, 10),
     ("recall:16:40/60", 40, 60), ("recall:16:8/60", 8, 60), ("recall:64:2000/60", 2000, 60)],
)  # fmt: skip
def test_the_command_that_comes_next_has_something_to_train_on(spec, train, test):
    found = CliRunner().invoke(app, ["data", spec])
    (line,) = [line for line in found.output.splitlines() if line.startswith("Next: tab compare")]
    words = shlex.split(line)
    overrides = dict(parse_override(word[6:]) for word in words if word.startswith("--set="))
    recipe, dataset = ("recall" if "--recipe=recall" in words else "fair"), load_dataset(spec)
    model = "tokens" if dataset.sequences else "mlp"
    config = load_recipe(recipe, overrides).run_config(model, "none", 0)
    batches, _, tested = split_batches(config, dataset, torch.device("cpu"))
    assert len(batches) > 0 and tested.samples == test
    if train < 100:
        assert overrides
    if spec == "shapes:90/10":
        assert overrides == {"data.validation": 9, "train.batch_size": 8}
    if spec in ("shapes:6000/10", "recall:64:2000/60"):
        assert not overrides


def test_a_data_set_checks_itself():
    images, labels = torch.zeros(4, 32, 32, 3).byte(), torch.tensor([0, 1, 0, 1])
    good = Split(images, labels)
    with pytest.raises(ValueError, match="images must be uint8"):
        Split(images.permute(0, 3, 1, 2), labels)
    with pytest.raises(ValueError, match=r"labels must be int64 \(4,\)"):
        Split(images, labels[:3])
    with pytest.raises(ValueError, match=r"labels are the numbers of classes, from 0; got -1"):
        Split(images, labels - 1)
    with pytest.raises(ValueError, match="test: label 1, but there are only 1 classes"):
        Dataset("x", ("a",), Split(images, labels * 0), good, "", "")
    with pytest.raises(ValueError, match="train: no image of class 'c'"):
        Dataset("x", ("a", "b", "c"), good, good, "", "")


def test_describe():
    data = load_dataset("shapes:40/20")
    rows = dict(data.facts())
    assert rows["images"] == "40 train, 20 test, 0.2 MiB as uint8"
    assert rows["class 0 disk"] == "4 train, 2 test" and rows["fingerprint"] == data.fingerprint
    mean, _ = statistics(data.train.images)
    assert rows["train mean"].startswith(f"{mean[0]:.4f} ") and "not CIFAR-10" in rows["note"]


def test_the_statistics_of_the_images_are_computed_once(monkeypatch):
    """For all runs of a study, on the same images; not of others, nor of changed ones."""
    asked = []

    def counted(images):
        asked.append(len(images))
        return statistics(images)

    monkeypatch.setattr(splits, "statistics", counted)
    images = torch.randint(0, 256, (40, 32, 32, 3), dtype=torch.uint8)
    some = torch.arange(30)
    first = splits._statistics(images, some)
    again = splits._statistics(images, some.clone())
    assert asked == [30] and all(map(torch.equal, first, again))
    splits._statistics(images, some + 1), splits._statistics(images), splits._statistics(images[:])
    assert asked == [30, 30, 40, 40]
    images[:30] = 7
    mean, std = splits._statistics(images, some)
    assert asked[4:] == [30] and mean.tolist() == [7] * 3 and std.tolist() == [1] * 3
