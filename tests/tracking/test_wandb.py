"""--watch wandb, offline: what would be sent is what is in the rows."""

import json
import struct
import sys

import pytest
from patience import PATIENCE
from small_cli import SMALL, flat, tab

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", str(PATIENCE))  # for its process to start
    yield
    wandb.teardown()


def records(file) -> list:
    """The protocol buffers in a .wandb file, which has LevelDB's log format: blocks of 32 KiB with
    chunks of (CRC, length, kind), where kind 1 is a whole record, 2 a first and 4 a last piece."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, found, whole = file.read_bytes(), 7, [], b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # the rest of a block is empty
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        if kind in (1, 4):
            found.append(Record.FromString(whole))
            whole = b""
        at += 7 + length
    return found


def items(updates) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}


def test_a_run_is_logged_and_keeps_its_identity_when_resumed(tmp_path):
    words = ("train", "mlp", "none", *SMALL, "--epochs", 2, "--out", tmp_path / "run")
    ran = tab(*words, "--watch", "wandb")
    assert ran.exit_code == 0 and "stopped" not in ran.output, ran.output
    assert "wandb sync" in flat(ran.output)
    wandb.teardown()  # its own process writes the file, at its leisure
    about = json.loads((tmp_path / "run/run.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run/rows.jsonl").read_text().splitlines()]
    (file,) = (tmp_path / "run/wandb/wandb").glob("offline-run-*/*.wandb")
    found = records(file)
    (run,) = [record.run for record in found if record.HasField("run")]
    assert run.display_name == "mlp-none-s0" and run.run_group == tmp_path.name
    assert run.project == "tab"
    assert run.run_id == (tmp_path / "run/wandb/mlp-none-s0.id").read_text()
    config = items(run.config.update)
    assert {key: config[key] for key in about["config"]} == about["config"]
    history = [items(record.history.item) for record in found if record.HasField("history")]
    assert [(h["epoch"], h["loss/train"]) for h in history] == [
        (row["epoch"], row["train_loss"]) for row in rows
    ]
    summary = {}
    for record in found:
        if record.HasField("summary"):
            summary |= items(record.summary.update)
    final = summary["summary"]
    assert final["final_test_accuracy"] == about["summary"]["final_test_accuracy"]
    assert summary["status"] == "done"


def test_without_a_key_nothing_begins(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("sys.stdin", None)
    wandb.teardown()
    ran = tab("train", "mlp", "none", *SMALL, "--out", tmp_path / "run", "--watch", "wandb")
    assert ran.exit_code == 2 and "WANDB_MODE=offline" in ran.output, ran.output
    assert not (tmp_path / "run").exists()


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    ran = tab("train", "mlp", "none", *SMALL, "--out", tmp_path / "run", "--watch", "wandb")
    assert ran.exit_code == 2 and "transformer-attention-bench[wandb]" in flat(ran.output)
