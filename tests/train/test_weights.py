"""Model files: read by anybody, enough to build the model again, and never misread."""

import hashlib
import json
import struct
import tarfile

import numpy as np
import pytest
import torch
from forks import python
from paths import FIXTURES
from safetensors import safe_open
from safetensors.torch import load_file

import tab
from tab.data.load import load_dataset
from tab.files import Corrupt
from tab.recipe.recipe import load_recipe
from tab.train import checkpoint
from tab.train.loop import load_trained, train
from tab.train.training_run import ANSWERS

OLD = FIXTURES / "results-0.1.tar.xz"
TINY = {
    **{"train.epochs": 2, "train.batch_size": 20, "data.images": 60, "data.validation": 20},
    **{"model.cnn.hidden": 8, "model.cnn.channels": 4, "attention.performer.num_heads": 2},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("shapes:100/20")


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset):
    """With weights in channels_last, 0-dimensional buffers, and of several dtypes."""
    out = tmp_path_factory.mktemp("run")
    config = load_recipe("quick", TINY).run_config("cnn", "performer", 0)
    train(config, dataset, out, stop_after=1)
    stopped = (out / "checkpoint.pt").read_bytes()
    train(config, dataset, out, resume=True)
    (out / "stopped.pt").write_bytes(stopped)
    return out


def predicted(model, about, images):
    """The classes, from what the file says of its input alone."""
    x = images.permute(0, 3, 1, 2).float()
    mean, scale = (torch.tensor(about[key])[:, None, None] for key in ("mean", "scale"))
    with torch.no_grad():
        return model((x - mean) * scale).argmax(-1).numpy()


def test_a_file_is_enough_to_rebuild_the_model(run, dataset, tmp_path):
    alone = tmp_path / "mine.safetensors"
    alone.write_bytes((run / "model.safetensors").read_bytes())
    with safe_open(alone, "pt") as file:
        about = json.loads(file.metadata()["tab"])
    assert about["classes"] == list(dataset.classes)
    with np.load(run / ANSWERS) as answers:
        want = answers["predicted"]
    for place in (run, str(run), alone):
        model = tab.load_model(place)
        assert not model.training and not any(m.training for m in model.modules())
        assert (predicted(model, about, dataset.test.images) == want).all()
    assert load_trained(alone)[1] == load_trained(run)[1]


def test_the_weights_are_those_of_the_model(run):
    found, state = load_file(run / "model.safetensors"), tab.load_model(run).state_dict()
    assert found.keys() == state.keys() and {t.dtype for t in found.values()} > {torch.float32}
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_the_checksum_is_what_the_documentation_says(run):
    with safe_open(run / "model.safetensors", "np") as file:
        about = json.loads(file.metadata()["tab"])
        sum_ = about.pop("sha256")
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for name in sorted(file.keys()):
            digest.update(name.encode() + file.get_tensor(name).tobytes())
    assert digest.hexdigest() == sum_


def test_the_same_run_leaves_the_same_bytes(run, dataset, tmp_path):
    config = load_recipe("quick", TINY).run_config("cnn", "performer", 0)
    train(config, dataset, tmp_path)
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


def damaged(raw: bytes, how: str) -> bytes:
    (size,) = struct.unpack("<Q", raw[:8])
    if how == "weight":
        return raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:]
    if how == "config":  # another number of heads builds the same weights into another function
        assert raw.count(b'\\"num_heads\\": 2') == 1
        return raw.replace(b'\\"num_heads\\": 2', b'\\"num_heads\\": 4')
    if how == "foreign":
        header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
        return struct.pack("<Q", len(header)) + header + b"x"
    return {"empty": b"", "truncated": raw[: 8 + size + 10], "garbage": b"\xff" * 500}[how]


@pytest.mark.parametrize("how", ["weight", "config", "foreign", "empty", "truncated", "garbage"])
def test_damage_is_one_line(how, run, tmp_path):
    raw = (run / "model.safetensors").read_bytes()
    (tmp_path / "run.json").write_bytes((run / "run.json").read_bytes())
    path = tmp_path / "model.safetensors"
    path.write_bytes(damaged(raw, how))
    with pytest.raises(Corrupt) as caught:
        tab.load_model(tmp_path)
    said = str(caught.value)
    assert said.startswith(str(path)) and f"remove {tmp_path} and resume" in said
    assert "\n" not in said
    path.unlink()
    with pytest.raises(ValueError, match=r"has lost its model\.safetensors"):
        tab.load_model(tmp_path)


def test_of_a_comparison_the_runs_with_a_model_are_listed(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"out holds no run: .*, nor is there such a directory"):
        tab.load_model(out)
    (out / "runs" / "begun").mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"; those in {out / 'runs'} have no trained model yet"):
        tab.load_model(out)
    for i in range(26):
        (out / "runs" / f"run{i:02}").mkdir()
        (out / "runs" / f"run{i:02}" / "model.safetensors").touch()
    with pytest.raises(ValueError, match=rf"a model: {out}/runs/run00, .*/run23 and 2 more$"):
        tab.load_model(out)


def test_a_checkpoint_is_a_plain_file_of_torch(run):
    state = torch.load(run / "stopped.pt", weights_only=True)
    assert state.keys() == {"rows", "model", "optimizer", "schedule", "average"}
    assert torch.load(run / "stopped.pt", weights_only=True, mmap=True)["rows"] == state["rows"]
    assert checkpoint.load(run / "stopped.pt")["rows"] == state["rows"]


def test_a_checkpoint_of_another_run_is_named(run, dataset, tmp_path):
    config = load_recipe("quick", TINY).run_config("cnn", "none", 0)
    train(config, dataset, tmp_path, stop_after=1)
    path = tmp_path / "checkpoint.pt"
    for foreign in ((run / "stopped.pt").read_bytes(), None):
        if foreign:
            path.write_bytes(foreign)
        else:
            checkpoint.save(path, {"epoch": 3})
        with pytest.raises(Corrupt) as caught:
            train(config, dataset, tmp_path, resume=True)
        assert str(path) in str(caught.value) and "remove it, and this run" in str(caught.value)


def test_models_of_version_0_1_load(tmp_path):
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    runs = sorted(tmp_path.glob("after/compare/runs/*"))
    assert runs and not list(tmp_path.glob("after/compare/runs/*/*.safetensors"))
    for path in runs:
        model = tab.load_model(path)
        raw = (path / "model.pt").read_bytes()
        assert raw.startswith(b"tab sha256 ") and not model.training
        (path / "model.pt").write_bytes(raw[:-1])
        with pytest.raises(Corrupt, match=r"model\.pt is truncated or altered.*; put a copy back"):
            tab.load_model(path)


def test_operators_do_not_wait_for_what_trains():
    program = "import sys, tab; tab.linear_attention; assert 'tab.train.loop' not in sys.modules"
    program += "; assert 'load_model' in tab.__all__; tab.load_model"
    done = python("-W", "ignore", "-c", program)
    assert done.returncode == 0, done.stderr
