"""CIFAR-10: torchvision's reader on small files of the same form."""

import hashlib
import os
import pickle

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from tab import _cifar10
from tab.data import load_dataset


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def cifar(root, monkeypatch):
    base = root / CIFAR10.base_folder
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def put(name: str, content: dict) -> tuple[str, str]:
        (base / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((base / name).read_bytes()).hexdigest()

    def batch() -> dict:
        data = rng.integers(0, 256, (20, 3072), np.uint8)
        return {"data": data, "labels": [i % 10 for i in range(20)]}

    train = [put(f"data_batch_{i}", batch()) for i in (1, 2)]
    name, md5 = put("batches.meta", {"label_names": list(_cifar10.CLASSES)})
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [put("test_batch", batch())])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return base


def test_cifar10_is_read_and_cached(cifar, root):
    data = load_dataset("cifar10", root=root, download=False)
    assert data.classes == _cifar10.CLASSES and (len(data.train), len(data.test)) == (40, 20)
    raw = pickle.loads((cifar / "data_batch_2").read_bytes())["data"][3]  # three planes
    assert np.array_equal(data.train.images[23].numpy(), raw.reshape(3, 32, 32).transpose(1, 2, 0))
    for file in cifar.iterdir():
        file.unlink()
    again = load_dataset("cifar10", root=root, download=False)
    assert again.fingerprint == data.fingerprint and "official" in again.note


class Bomb:
    def __reduce__(self):
        return (os._exit, (3,))


def test_altered_cifar10_is_named_and_not_unpickled(cifar, root):
    (cifar / "test_batch").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(OSError, match=r"test_batch is truncated or altered.*--data shapes"):
        load_dataset("cifar10", root=root, download=False)
    (cifar / "data_batch_1").unlink()
    with pytest.raises(OSError, match=r"data_batch_1 is missing.*Allow the download"):
        load_dataset("cifar10", root=root, download=False)


def test_cifar10_without_a_network(root, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(OSError, match=r"data_batch_1 is missing.*Fetch http://127\.0\.0\.1:9"):
        load_dataset("cifar10", root=root)
