"""CIFAR-10 and CIFAR-100: small files of the official form, with sums of their own."""

import hashlib
import os
import pickle
import shutil
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from patience import tick
from torchvision.datasets import CIFAR10, CIFAR100

from tab.data import cifar as _cifar
from tab.data.load import load_dataset


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


def official(kind, base, monkeypatch, train, test, labels, classes):
    """A folder `base` of small files; torchvision's table of names and sums is of these."""
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def put(name: str, content: dict) -> tuple[str, str]:
        (base / name).write_bytes(pickle.dumps(content, protocol=2))
        return name, hashlib.md5((base / name).read_bytes()).hexdigest()

    def batch() -> dict:
        data = rng.integers(0, 256, (2 * len(classes), 3072), np.uint8)
        wrong = {"coarse_labels": [0] * 2 * len(classes)}
        return {"data": data, labels: list(range(len(classes))) * 2} | wrong

    monkeypatch.setattr(kind, "train_list", [put(name, batch()) for name in train])
    monkeypatch.setattr(kind, "test_list", [put(name, batch()) for name in test])
    key = kind.meta["key"]
    name, md5 = put(kind.meta["filename"], {key: classes, "coarse_label_names": ["x"] * 20})
    monkeypatch.setattr(kind, "meta", {"filename": name, "key": key, "md5": md5})
    return base


@pytest.fixture
def cifar(root, monkeypatch):
    names = ["data_batch_1", "data_batch_2"], ["test_batch"], "labels", list(_cifar.CLASSES)
    return official(CIFAR10, root / "cifar-10-batches-py", monkeypatch, *names)


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    classes = [f"class{i:02}" for i in range(100)]
    names = ["train"], ["test"], "fine_labels", classes
    return official(CIFAR100, tmp_path / "cifar-100-python", monkeypatch, *names)


def pack(base, monkeypatch):
    """The archive as it is downloaded."""
    archive = base.parent / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(base, base.name)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive


def test_cifar10_is_read_and_cached(cifar, root):
    data = load_dataset("cifar10", root=root, download=False)
    assert data.classes == _cifar.CLASSES and (len(data.train), len(data.test)) == (40, 20)
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


def test_the_archive_in_the_data_root_will_do(cifar, root, monkeypatch):
    expected = load_dataset(cifar, root=root).fingerprint
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    pack(cifar, monkeypatch)
    (cifar / "test_batch").write_bytes(pickle.dumps(Bomb()))  # the archive is whole
    assert load_dataset("cifar10", root=root, download=False).fingerprint == expected
    shutil.rmtree(cifar)
    shutil.rmtree(root / "cache")
    assert load_dataset("cifar10", root=root).fingerprint == expected


def test_cifar10_is_fetched(cifar, root, tmp_path, monkeypatch):
    expected = load_dataset(cifar, root=root).fingerprint
    archive = pack(cifar, monkeypatch)
    files = partial(SimpleHTTPRequestHandler, directory=archive.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
        monkeypatch.setattr(CIFAR10, "url", url)
        assert load_dataset("cifar10", root=tmp_path / "fresh").fingerprint == expected
        monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)  # what came is not what was to come
        with pytest.raises(OSError, match=r"data_batch_1 is missing \(.*corrupted.*Fetch http"):
            load_dataset("cifar10", root=tmp_path / "other")
        server.shutdown()


def test_cifar10_by_its_folder_or_archive(cifar, root, tmp_path, monkeypatch):
    expected = load_dataset("cifar10", root=root, download=False)
    archive = pack(cifar, monkeypatch)
    alone = tmp_path / "renamed"
    cifar.rename(alone)
    (tmp_path / "above").mkdir()
    os.symlink(alone, tmp_path / "above/cifar-10-batches-py")
    for path in (alone, tmp_path / "above", archive):
        for _ in range(2):  # the second time from the cache
            data = load_dataset(path, root=tmp_path / "cache")
            assert data.fingerprint == expected.fingerprint and data.classes == _cifar.CLASSES
            assert data.name == f"folder:{path.name}" and data.note == expected.note


def test_cifar100_has_its_fine_classes(cifar100, root, tmp_path, monkeypatch):
    raw = pickle.loads((cifar100 / "train").read_bytes())
    for path in (cifar100, cifar100.parent, pack(cifar100, monkeypatch)):
        data = load_dataset(path, root=root)
        assert data.train.labels.tolist() == raw["fine_labels"] and len(data.test) == 200
        image = raw["data"][7].reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(data.train.images[7].numpy(), image)
        assert data.classes[99] == "class99" and "CIFAR-100" in data.note
        assert "fine" in data.note
        if path == cifar100.parent:
            shutil.rmtree(root)


def test_places_that_cannot_be_written(cifar, cifar100, tmp_path):
    """A file stands where the cache would be; so nothing can be written, by root neither."""
    (cifar.parent / "cache").write_text("in the way")
    for spec in ("cifar10", cifar, cifar100):
        with pytest.warns(UserWarning, match="is not cached"):
            assert len(load_dataset(spec, root=cifar.parent).train) in (40, 200)


@pytest.mark.parametrize("name", ["data_batch_2", "batches.meta"])
def test_altered_files_of_a_folder_are_named_and_not_unpickled(cifar, root, name):
    (cifar / name).write_bytes(pickle.dumps(Bomb()))
    said = rf"CIFAR-10 is not whole: .*/{name} is truncated or altered; unpack http.*gz again"
    with pytest.raises(OSError, match=said):
        load_dataset(cifar, root=root)
    (cifar / name).unlink()
    with pytest.raises(OSError, match=rf"{name} is missing; unpack http"):
        load_dataset(cifar.parent, root=root)


def test_a_changed_folder_is_not_served_from_the_cache(cifar, root):
    load_dataset(cifar, root=root)
    file = cifar / "test_batch"
    before = file.stat()
    tick(file)
    file.write_bytes(bytes(before.st_size))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(OSError, match="test_batch is truncated or altered"):
        load_dataset(cifar, root=root)


def test_the_binary_version_is_told_apart(root, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/data_batch_1.bin").write_bytes(bytes(3073))
    with pytest.raises(ValueError, match=r"holds data_batch_1\.bin; .* the Python version of"):
        load_dataset(tmp_path / "bin", root=root)
