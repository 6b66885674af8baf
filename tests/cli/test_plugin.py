"""--plugin: an attention of one's own in a file, kept with a study and taken along to its tasks."""

import json
import sys
import tomllib
from pathlib import Path

import pytest
from small_cli import SMALL, flat, tab
from small_plugin import compared, packaged

from tab import plugins
from tab.layers import _registry
from tab.tasks.processes import Processes
from tab.tasks.tasks import Task, run_tasks

SOURCE = """
from tab.layers import HeadsAttention, register_attention

@register_attention("mine")
class Mine(HeadsAttention):
    title = "My own"

    def attend(self, q, k, v, key_mask):
        return (q @ k.mT).sigmoid() @ v / k.shape[-2]

    def weights(self, q, k):
        return (q @ k.mT).softmax(-1)
"""


pytestmark = pytest.mark.usefixtures("forgotten")


def forget(monkeypatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(plugins, "_loaded", {})
    _registry._layers.pop("mine", None)


@pytest.fixture
def mine(tmp_path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_a_comparison_keeps_its_plugin_and_goes_on_with_it(mine, tmp_path, monkeypatch):
    out = tmp_path / "out"
    result = compared(mine, out)
    assert result.exit_code == 0, result.output
    assert "My own" in result.stdout and f"--plugin={mine}" in result.stdout
    (kept,) = tomllib.loads((out / "config.toml").read_text())["grid"]["plugins"]
    assert kept["name"] == str(mine) and len(kept["sha256"]) == 64
    run = json.loads((out / "runs/mlp-mine-s0/run.json").read_text())
    assert run["plugin"] == kept
    assert json.loads((out / "runs/mlp-none-s0/run.json").read_text())["plugin"] is None

    forget(monkeypatch)
    assert "My own" in tab("report", out).stdout  # config.toml says where it is
    forget(monkeypatch)
    moved = mine.rename(tmp_path / "elsewhere.py")
    for words in (("compare", "--resume", out), ("report", out), ("robustness", out)):
        result = tab(*words)
        assert result.exit_code == 2 and f"there is no plugin file {mine}" in flat(result.stderr)
    result = tab("compare", "--resume", out, "--plugin", moved)
    assert result.exit_code == 0 and "My own" in result.stdout, result.output

    forget(monkeypatch)
    mine.write_text(SOURCE.replace("sigmoid", "tanh"))
    result = tab("compare", "--resume", out, "--plugin", mine)
    assert result.exit_code == 2 and f"{mine} is none of the plugins" in flat(result.stderr)
    moved.write_text(SOURCE.replace("sigmoid", "tanh"))
    result = tab("compare", "--resume", out)
    assert result.exit_code == 2 and f"the plugin {moved} has changed" in flat(result.stderr)
    assert "mine" not in _registry._layers


def test_one_run_does_not_go_on_with_another_formula(mine, tmp_path, monkeypatch):
    words = ("train", "mlp", "mine", *SMALL, "--plugin", mine, "--out", tmp_path / "run")
    assert tab(*words).exit_code == 0
    forget(monkeypatch)
    mine.write_text(SOURCE.replace("sigmoid", "tanh"))
    result = tab(*words, "--resume")
    assert result.exit_code == 2 and f"begun with the plugin {mine}" in flat(result.stderr)


def trained(*, folder: Path, emit) -> str:
    from tab.layers import get_attention

    return get_attention("mine").title


def test_another_process_runs_the_plugin_without_its_file(mine, tmp_path):
    plugins.load([plugins.find(str(mine))])
    task = Task(trained, (), tmp_path / "task")
    mine.unlink()
    (done,) = run_tasks([task], Processes(1, 1))
    assert done.value == "My own", done.traceback
    (lost,) = run_tasks([Task(trained, (), tmp_path / "task", plugins=())], Processes(1, 1))
    assert "unknown attention 'mine'" in str(lost.error)  # the control: it is what carries it


def test_a_sweep_keeps_its_plugin(mine, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    out = tmp_path / "sweep"
    words = ("--models", "mlp", "--attentions", "mine", "--configurations", 2, "--epochs", "1,2")
    small = [word for word in SMALL if word not in ("--epochs", "1")]
    more = ("--plugin", mine, "--images", 0, "--validation", 20, "--out", out)
    result = tab("sweep", *words, *small, *more)
    assert result.exit_code == 0 and f"--plugin={mine}" in result.stdout, result.output
    forget(monkeypatch)
    assert "My own" in tab("sweep", "show", out).stdout
    forget(monkeypatch)
    mine.unlink()
    result = tab("sweep", "--resume", out)
    assert result.exit_code == 2 and f"there is no plugin file {mine}" in flat(result.stderr)


def test_a_module_is_known_by_all_of_its_files(tmp_path, monkeypatch):
    layer = packaged(tmp_path, monkeypatch, "my_own_attention", SOURCE)
    result = tab("list", "attentions", "--plugin", "my_own_attention", "--json")
    names = [row["name"] for row in json.loads(result.stdout)["attentions"]]
    assert "mine" in names
    assert plugins.origin(_registry._layers["mine"])["name"] == "my_own_attention"
    kept = plugins.find("my_own_attention").record()
    layer.write_text(SOURCE + "\n")
    with pytest.raises(ValueError, match="the plugin my_own_attention has changed since"):
        plugins.again([kept])
    for name in [name for name in sys.modules if name.startswith("my_own_attention")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("given", "content", "message"),
    [
        ("nowhere.py", None, "there is no plugin file nowhere.py"),
        ("no_such_module_of_mine", None, "install it, or give a file, such as no_such_module"),
        ("broken.py", "1 / 0", "broken.py does not load: ZeroDivisionError"),
        ("wrong.py", "def x(:", "wrong.py does not load: SyntaxError"),
        ("twice.py", SOURCE.replace("mine", "linear"), "'linear' is already LinearAttention"),
        ("again.py", SOURCE.replace("mine", "linear"), "LinearAttention; give yours another name"),
        ("bare.py", SOURCE.replace('("mine")', ""), 'write @register_attention("NAME")'),
    ],
)
def test_a_plugin_that_fails_is_named(given, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content:
        Path(given).write_text(content)
    result = tab("check", "--plugin", given)
    assert result.exit_code == 2 and message in flat(result.stderr), result.output
    assert result.stderr.startswith("error: ")


def test_an_unknown_attention_says_how_one_of_your_own_is_loaded():
    result = tab("check", "--attentions", "mine")
    assert result.exit_code == 2 and "--plugin FILE loads" in flat(result.stderr)
    assert '@register_attention("NAME") above its class' in flat(result.stderr)
