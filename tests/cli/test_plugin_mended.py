"""A plugin that was mended: what failed goes on with it, what it trained before does not."""

import json
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from small_cli import SMALL, flat, tab
from small_plugin import MENDED, compared, packaged

from tab import plugins
from tab.layers import Attention, _registry, register_attention
from tab.recipe.recipe import load_recipe
from tab.recipe.size_matching import parameters_of

pytestmark = pytest.mark.usefixtures("forgotten")


def kept(out: Path) -> dict[str, str]:
    (found,) = tomllib.loads((out / "config.toml").read_text())["grid"]["plugins"]
    return found


def test_what_failed_goes_on_with_a_mended_plugin(mine, tmp_path):
    out = tmp_path / "out"
    assert compared(mine, out).exit_code == 1
    before = kept(out)
    mine.write_text(MENDED)
    assert tab("report", out).exit_code == 0 and kept(out) == before  # it only looks
    result = tab("compare", "--resume", out)
    assert result.exit_code == 0, result.output
    assert flat(result.stderr).count(f"{mine} has changed; nothing was trained with what it") == 1
    run = json.loads((out / "runs/mlp-mine-s0/run.json").read_text())
    assert run["plugin"] == kept(out) == plugins.find(str(mine)).record() != before
    again = tab("compare", "--resume", out)
    assert again.exit_code == 0 and "has changed" not in again.output


def test_what_was_trained_keeps_its_plugin_until_it_is_removed(mine, tmp_path):
    """One seed has an epoch of the old code, and names the folder to remove."""
    out, run = tmp_path / "out", tmp_path / "out/runs/mlp-mine-s0"
    mine.write_text(MENDED)
    assert compared(mine, out).exit_code == 0
    before = kept(out)
    mine.write_text(MENDED.replace("self.proj(x)", "self.proj(x).tanh()"))
    for words in (("compare", "--resume", out), ("compare", "--resume", out, "--plugin", mine),
                  ("report", out), ("robustness", out)):  # fmt: skip
        result = tab(*words)
        assert result.exit_code == 2 and f"{mine} has changed since" in flat(result.stderr)
        assert f"remove what was trained with that, and it is trained anew: {run}" in flat(
            result.stderr
        )
    assert kept(out) == before
    control = (out / "runs/mlp-none-s0/run.json").read_bytes()
    shutil.rmtree(run)
    result = tab("compare", "--resume", out)
    assert result.exit_code == 0 and "has changed; nothing" in flat(result.stderr), result.output
    assert json.loads((run / "run.json").read_text())["plugin"] == kept(out) != before
    assert (out / "runs/mlp-none-s0/run.json").read_bytes() == control


def test_a_plugin_that_moved_is_known_there_from_then_on(mine, tmp_path):
    out = tmp_path / "out"
    mine.write_text(MENDED)
    assert compared(mine, out).exit_code == 0
    moved = mine.rename(tmp_path / "elsewhere.py")
    assert tab("compare", "--resume", out).exit_code == 2
    assert tab("compare", "--resume", out, "--plugin", moved).exit_code == 0
    assert kept(out)["name"] == str(moved) and tab("report", out).exit_code == 0


def test_a_plugin_is_mended_and_given_from_another_folder(mine, tmp_path):
    out = tmp_path / "out"
    assert compared(mine, out).exit_code == 1
    mine.unlink()
    (tmp_path / "fixed").mkdir()
    fixed = tmp_path / "fixed/mine.py"
    fixed.write_text(MENDED)
    other = tmp_path / "other.py"
    other.write_text(MENDED)
    result = tab("compare", "--resume", out, "--plugin", other)
    assert result.exit_code == 2 and f"there is no plugin file {mine}" in flat(result.stderr)
    plugins._loaded.clear(), _registry._layers.pop("mine", None)
    result = tab("compare", "--resume", out, "--plugin", fixed)
    assert result.exit_code == 0 and kept(out)["name"] == str(fixed), result.output


def test_one_run_goes_on_with_a_mended_plugin_of_another_size(mine, tmp_path):
    """Sizes are matched for the layer as it is: the run that failed had another config."""
    run = tmp_path / "run"
    words = ("train", "mlp", "mine", *SMALL, "--plugin", mine, "--out", run)
    words = (*words, "--set", "model.mlp.match=multi_head")
    result = tab(*words)
    assert result.exit_code != 0 and "not yet" in result.output + str(result.exception)
    before = json.loads((run / "run.json").read_text())
    assert before["summary"]["num_epochs"] == 0
    mine.write_text(MENDED.replace("Linear(dim, dim)", "Linear(dim, dim, bias=False)"))
    result = tab(*words, "--resume")
    assert result.exit_code == 0, result.output
    after = json.loads((run / "run.json").read_text())
    assert (after["status"], after["plugin"]) == ("done", plugins.find(str(mine)).record())
    assert after["summary"]["parameters"] != before["summary"]["parameters"]


def test_from_python_it_is_mended_within_one_process(mine, tmp_path):
    import tab as library

    few = {"data.images": 60, "data.validation": 20, "train.batch_size": 20}
    given = {"recipe": "quick", "data": "shapes:100/20", "epochs": 1, "overrides": few}
    out = tmp_path / "out"
    with pytest.warns(UserWarning, match="failed: mlp-mine-s0"):
        library.compare(["mine"], "mlp", out=out, tell=None, plugins=[mine], **given)
    mine.write_text(MENDED)
    lines = []
    found = library.load_study(out).resume(tell=lines.append)
    assert [run.status for run in found.runs] == ["done"]
    assert f"{mine} has changed; nothing was trained with what it was" in lines


def test_a_module_that_changed_is_not_taken_for_what_it_was(tmp_path, monkeypatch):
    """Python would not read it again."""
    layer = packaged(tmp_path, monkeypatch, "attention_of_mine", MENDED)
    package = layer.parent
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    plugins.load([plugins.find(package.name)])
    first = _registry.get_attention("mine")
    layer.write_text(MENDED.replace("My own", "Mended"))
    plugins.load([plugins.find(package.name)])
    assert (first.title, _registry.get_attention("mine").title) == ("My own", "Mended")
    assert plugins.origin(_registry.get_attention("mine")) == plugins.find(package.name).record()
    assert len(plugins.loaded()) == 1
    for name in [name for name in sys.modules if name.startswith(package.name)]:
        monkeypatch.delitem(sys.modules, name)


def test_a_class_that_is_defined_again_takes_its_place():
    """As when a cell of a notebook runs again; another class does not. Sizes are the new one's."""

    def define(width: int) -> type[Attention]:
        import torch

        @register_attention("mine")
        class Mine(Attention):
            def __init__(self, dim, *, seq_len, grid=None):
                super().__init__()
                self.proj = torch.nn.Linear(dim, width)

            def compute(self, x, key_mask):
                return x

        return Mine

    sizes = []
    for width in (8, 16):
        assert define(width) is _registry.get_attention("mine")
        config = load_recipe("fair", {"model.mlp.match": ""}).run_config("mlp", "mine", 0)
        sizes.append(parameters_of(config))
    assert sizes[1] - sizes[0] == 8 * (config.model_options.hidden + 1)
    with pytest.raises(ValueError, match=r"'mine' is already .*Mine; give yours another name"):
        register_attention("mine")(_registry.get_attention("linear"))
