"""--tensorboard, or --watch tensorboard: what is in the event files is what is in the rows."""

import json
import sys

import pytest
from small_cli import SMALL, flat, tab

NAMES = ("--models", "mlp", "--attentions", "none,multi_head")


def events_of(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return events


def agree(folder, run) -> None:
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    events = events_of(folder)
    found = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    wanted = [(row["epoch"], pytest.approx(row["train_loss"])) for row in rows]
    assert found["loss/train"] == wanted
    final = (rows[-1]["epoch"], pytest.approx(rows[-1]["test_accuracy"]))
    assert found["accuracy/test"] == found["summary/final_test_accuracy"] == [final]
    assert {"accuracy/validation", "cost/seconds", "learning_rate"} <= set(found)
    assert "epoch" not in found and len(found["cost/seconds"]) == len(rows)
    about = json.loads((run / "run.json").read_text())
    assert (
        json.loads(events.Tensors("config/text_summary")[0].tensor_proto.string_val[0])
        == (about["config"])
    )
    # What TensorBoard's HParams tab reads: the options of the run, and which figures are its end.
    hparams = plugin_data(events, "_hparams_/session_start_info").session_start_info.hparams
    config = about["config"]
    assert hparams["train.lr"].number_value == config["train"]["lr"]
    assert hparams["attention"].string_value == config["attention"]
    assert hparams["status"].string_value == "done"
    metrics = plugin_data(events, "_hparams_/experiment").experiment.metric_infos
    assert "summary/final_test_accuracy" in {info.name.tag for info in metrics}


def plugin_data(events, tag):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    return HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)


@pytest.mark.parametrize("option", [["--tensorboard"], ["--watch", "tensorboard"]])
def test_compare_logs_each_run(option, tmp_path):
    pytest.importorskip("tensorboard")
    result = tab("compare", *NAMES, *SMALL, "--epochs", 2, "--out", tmp_path / "g", *option)
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
