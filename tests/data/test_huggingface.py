"""--data hf:…: data sets of Hugging Face's `datasets`, built here and read without a network."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from small_cli import SMALL, flat, tab

from tab.data.huggingface import Source
from tab.data.load import load_dataset
from tab.study.given import place_of

hf = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    hf.disable_progress_bars()
    monkeypatch.setenv("TAB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(hf.config, "HF_HUB_OFFLINE", True)


def picture(colour: tuple, width: int = 40) -> dict:
    out = io.BytesIO()
    Image.new("RGB", (width, 30), colour).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def table(count: int, *, labels=None, **columns):
    """Images whose red channel is their number; labels 0, 1, 2, 0, …"""
    labels = [i % 3 for i in range(count)] if labels is None else labels
    features = {
        "img": hf.Image(),
        "fine": hf.ClassLabel(names=["ant", "bee", "cow"]),
        "width": hf.Value("int64"),
        "kind": hf.Value("string"),
    }
    rows = {
        "img": [picture((i, 0, 0)) for i in range(count)],
        "fine": labels,
        "width": [40] * count,
        "kind": ["xyz"[i % 3] for i in range(count)],
    }
    for name, (feature, values) in columns.items():
        features[name], rows[name] = feature, values
    return hf.Dataset.from_dict(rows, features=hf.Features(features))


@pytest.fixture
def saved(tmp_path):
    def save(**splits) -> str:
        hf.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
        return f"hf:{tmp_path / 'saved'}"

    return save


def test_columns_and_splits_are_found(saved):
    spec = saved(train=table(7), test=table(4))
    data = load_dataset(spec, size=16)
    assert data.classes == ("ant", "bee", "cow") and data.size == 16
    assert torch.equal(data.train.labels, torch.arange(7) % 3)
    images = np.zeros((7, 16, 16, 3), np.uint8)
    images[..., 0] = np.arange(7)[:, None, None]
    assert np.array_equal(data.train.images.numpy(), images) and len(data.test) == 4
    assert "7 train, 4 test, 11 of them resized to 16×16 after cutting" in data.note


def test_names_choose_columns_and_splits(saved):
    coarse = (hf.ClassLabel(names=["small", "large"]), [0, 1, 0, 1, 1])
    spec = saved(most=table(5, coarse=coarse), train=table(3), rest=table(5, coarse=coarse))
    data = load_dataset(f"{spec}?train=most&test=rest&label=coarse&image=img")
    assert data.classes == ("small", "large") and data.train.labels.tolist() == coarse[1]
    assert "the split rest is the test set" in data.note
    texts = load_dataset(f"{spec}?train=most&test=rest&label=kind")
    assert texts.classes == ("x", "y", "z") and texts.train.labels.tolist() == [0, 1, 2, 0, 1]


def test_what_cannot_be_known_is_asked_for(saved):
    coarse = (hf.ClassLabel(names=["small", "large"]), [0, 1, 0])
    spec = saved(train=table(3, coarse=coarse), test=table(3, coarse=coarse), other=table(3))
    for query, said in {
        "": r"which is the label\? There are fine, width, kind, coarse; say it as hf:NAME\?label=…",
        "?label=size": r"there is no 'size'; choose from fine, width, kind, coarse",
        "?label=fine&test=rest": r"there is no 'rest'; choose from train, test, other",
        "?label=fine&lable=x": r"lable",
        "?label=fine&label=coarse": r"give each key once",
        "?label": r"give each key once",
    }.items():
        with pytest.raises(ValueError, match=said):
            load_dataset(spec + query)


def test_a_share_of_train_is_tested_on_where_there_is_nothing_else(saved):
    spec = saved(train=table(30), rest=table(6))
    said = r"nothing to test on: give --set data\.test_share=0\.2 .*, or name one of train, rest as"
    with pytest.raises(ValueError, match=said):
        load_dataset(spec)
    data = load_dataset(spec, test_share=0.2)
    assert torch.bincount(data.test.labels).tolist() == [2] * 3 and len(data.train) == 24
    reds = [set(split.images[:, 0, 0, 0].tolist()) for split in (data.train, data.test)]
    assert not reds[0] & reds[1] and reds[0] | reds[1] == set(range(30))
    assert "24 train, 6 test" in data.note and "of its 30 images 6 were drawn" in data.note
    with pytest.raises(ValueError, match="has test images of its own"):
        load_dataset(f"{spec}?test=rest", test_share=0.2)
    with pytest.raises(ValueError, match="has test images of its own"):
        load_dataset(saved(train=table(3), val=table(3)), test_share=0.2)


def test_a_column_without_classes_is_named(saved):
    several = (hf.Sequence(hf.Value("int64")), [[0, 1], [2], []])
    spec = saved(train=table(3, several=several), test=table(3, several=several))
    with pytest.raises(ValueError, match=r"several holds no classes but values such as \[0, 1\]"):
        load_dataset(f"{spec}?label=several")


@pytest.mark.parametrize(
    "file", ["dataset_dict.json", "train/state.json", "train/dataset_info.json"]
)
def test_a_damaged_folder_is_named(saved, file, tmp_path):
    spec = saved(train=table(3), test=table(3))
    (tmp_path / "saved" / file).write_text('{"half')
    with pytest.raises(ValueError, match="saved cannot be read: "):
        load_dataset(spec)


def test_hidden_labels_and_broken_pictures_are_named(saved):
    spec = saved(train=table(3), test=table(3, labels=[-1, -1, -1]))
    with pytest.raises(ValueError, match="3 of 3 images of the split test have no label in fine"):
        load_dataset(spec)
    broken = table(3).to_dict()
    broken["img"][1] = {"bytes": b"no picture", "path": None}
    broken = hf.Dataset.from_dict(broken, features=table(3).features)
    with pytest.raises(ValueError, match="image 1 of test is no whole picture"):
        load_dataset(saved(train=table(3), test=broken))


def test_the_cache_follows_the_folder(saved, tmp_path, monkeypatch):
    spec = saved(train=table(3), test=table(3))
    first = load_dataset(spec)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "datasets", None)  # not read again
        assert load_dataset(spec).fingerprint == first.fingerprint
    (tmp_path / "saved/dataset_dict.json").touch()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=r"transformer-attention-bench\[hf\]"):
            load_dataset(spec)
    assert load_dataset(spec).fingerprint == first.fingerprint


def test_folders_of_pictures_and_their_place(tmp_path, monkeypatch):
    for split in ("train", "test"):
        for i, name in enumerate(("cat", "dog")):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (100 * i, 0, 0)).save(folder / "a.png")
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    assert place_of("hf:set?label=label") == f"hf:{tmp_path / 'set'}?label=label"
    data = load_dataset("hf:set")
    assert data.classes == ("cat", "dog") and data.train.images[:, 0, 0, 0].tolist() == [0, 100]


def test_a_run_on_it_is_measured_without_naming_it_again(saved, tmp_path):
    spec = saved(train=table(90), test=table(30))
    words = [word if word != "shapes:100/20" else spec for word in SMALL]
    ran = tab("train", "mlp", "none", *words, "--out", tmp_path / "run")
    assert ran.exit_code == 0, ran.output
    ran = tab("robustness", tmp_path / "run", "--images", 4)
    assert ran.exit_code == 0, ran.output


@pytest.mark.parametrize("spec", ["hf:", "hf:?label=x", "hf:./nothing", "hf:nobody/nothing"])
def test_names_that_lead_nowhere(spec, tmp_path):
    ran = tab("train", "mlp", "none", *SMALL[:2], "--data", spec, "--out", tmp_path / "run")
    assert ran.exit_code == 2 and spec.split("?")[0] in flat(ran.stderr)
    assert "Traceback" not in ran.stderr and not (tmp_path / "run").exists()


def test_specs_are_written_as_read():
    spec = "hf:org/name?image=img&label=a b&revision=v1.0"
    source = Source.of(spec)
    assert (source.image, source.label, source.revision) == ("img", "a b", "v1.0")
    assert Source.of(source.spec) == source
