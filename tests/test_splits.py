"""What a data set is: checks, statistics, held-out images."""

import numpy as np
import pytest
import torch

from tab.data import Dataset, Split, describe, hold_out, load_dataset, statistics


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


def test_a_data_set_checks_itself():
    images, labels = torch.zeros(4, 32, 32, 3).byte(), torch.tensor([0, 1, 0, 1])
    good = Split(images, labels)
    with pytest.raises(ValueError, match="images must be uint8"):
        Split(images.permute(0, 3, 1, 2), labels)
    with pytest.raises(ValueError, match=r"labels must be int64 \(4,\)"):
        Split(images, labels[:3])
    with pytest.raises(ValueError, match="test: label 1, but there are only 1 classes"):
        Dataset("x", ("a",), Split(images, labels * 0), good, "", "")
    with pytest.raises(ValueError, match="train: no image of class 'c'"):
        Dataset("x", ("a", "b", "c"), good, good, "", "")


def test_describe():
    data = load_dataset("shapes:40/20")
    rows = dict(describe(data))
    assert rows["images"] == "40 train, 20 test, 0.2 MiB as uint8"
    assert rows["class 0 disk"] == "4 train, 2 test" and rows["fingerprint"] == data.fingerprint
    mean, _ = statistics(data.train.images)
    assert rows["train mean"].startswith(f"{mean[0]:.4f} ") and "not CIFAR-10" in rows["note"]
