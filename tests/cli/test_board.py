"""--tensorboard: what is in the event files is what is in the rows."""

import json
import sys

import pytest
from small_cli import SMALL, flat, tab

NAMES = ("--models", "mlp", "--attentions", "none,multi_head")


def scalars(folder) -> dict[str, list]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def agree(folder, run) -> None:
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    found = scalars(folder)
    wanted = [(row["epoch"], pytest.approx(row["train_loss"])) for row in rows]
    assert found["loss/train"] == wanted
    assert found["accuracy/test"] == [(rows[-1]["epoch"], pytest.approx(rows[-1]["test_accuracy"]))]
    assert {"accuracy/validation", "cost/seconds", "learning_rate"} <= set(found)
    assert "epoch" not in found and len(found["cost/seconds"]) == len(rows)


def test_compare_logs_each_run(tmp_path):
    pytest.importorskip("tensorboard")
    result = tab("compare", *NAMES, *SMALL, "--epochs", 2, "--out", tmp_path / "g", "--tensorboard")
    assert result.exit_code == 0, result.output
    assert "tensorboard --logdir" in result.output and "epoch 2/2" in result.output
    for name in ("mlp-none-s0", "mlp-multi_head-s0"):
        agree(tmp_path / "g" / "tensorboard" / name, tmp_path / "g" / "runs" / name)


def test_train_logs_its_run(tmp_path):
    pytest.importorskip("tensorboard")
    result = tab("train", "mlp", "none", *SMALL, "--out", tmp_path / "run", "--tensorboard")
    assert result.exit_code == 0, result.output
    agree(tmp_path / "run" / "tensorboard" / "mlp-none-s0", tmp_path / "run")


@pytest.mark.parametrize("command", [("compare", *NAMES), ("train", "mlp", "none")])
def test_without_tensorboard_the_extra_is_named_and_nothing_begins(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = tab(*command, *SMALL, "--out", tmp_path / "out", "--tensorboard")
    assert result.exit_code == 2 and "transformer-attention-bench[tensorboard]" in flat(
        result.output
    )
    assert not (tmp_path / "out").exists()
