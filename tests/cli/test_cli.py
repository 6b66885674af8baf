"""The command line: every command once, what it refuses, how it ends."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import typer
from forks import python
from patience import PATIENCE, until
from small_cli import SMALL, flat, tab
from small_pictures import CLASSES, build

from tab.analysis.same_function import Identity
from tab.cli.main import app


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "grid"
    names = ("--models", "mlp", "--attentions", "none,multi_head")
    result = tab("compare", *names, *SMALL, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_compare_shows_the_table_the_data_and_the_report(compared):
    out, text = compared
    assert "epoch 1/1" in text and "mlp-multi_head-s0 done" in text  # plain lines: no terminal
    assert "Multi-Head" in text and "baseline" in text
    title = next(line for line in text.splitlines() if line.startswith("MLP, "))
    assert "not CIFAR-10" in title
    assert f"Report: {out / 'report.html'}" in text and (out / "report.md").is_file()
    assert 10_000 < (out / "report.html").stat().st_size < 5_000_000


def test_report_rebuilds_everything_without_training(compared):
    out, _ = compared
    pictures = sorted(path.name for path in (out / "pictures").iterdir())
    before = (out / "report.md").read_text(), (out / "experiment_summary.csv").read_text()
    for path in (out / "report.md", out / "experiment_summary.csv", *(out / "pictures").iterdir()):
        path.unlink()
    result = tab("report", out)
    assert result.exit_code == 0, result.output
    assert "epoch" not in result.output
    assert sorted(path.name for path in (out / "pictures").iterdir()) == pictures
    after = (out / "report.md").read_text(), (out / "experiment_summary.csv").read_text()
    assert after == before


def test_resume_of_a_finished_comparison_trains_nothing(compared):
    out, _ = compared
    result = tab("compare", "--resume", out, "--models", "mlp", "--epochs", "1")
    assert result.exit_code == 0, result.output
    assert "epoch 1/1" not in result.output


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--models", "cnn"], "--models: was ['mlp'], now ['cnn']"),
        (["--seeds", "3"], "--seeds: was 1, now 3"),
        (["--epochs", "7"], "--epochs, --set or --compile: the recipe is then another one"),
        (["--recipe", "fair"], "--recipe: was 'quick', now 'fair'"),
        (["--data", "shapes:50/20"], "was made with shapes:100/20 ("),
        (["--out", "elsewhere"], "drop --out"),
    ],
)
def test_resume_with_a_conflicting_option_is_an_error(option, message, compared):
    result = tab("compare", "--resume", compared[0], *option)
    assert result.exit_code == 2
    assert message in flat(result.stderr)


def test_compile_is_a_key_of_the_recipe(compared):
    """--compile reaches the recipe: there it contradicts how the comparison was started."""
    result = tab("compare", "--resume", compared[0], "--compile")
    assert (
        result.exit_code == 2
        and "--epochs, --set or --compile: the recipe is then another one" in flat(result.output)
    )
    config = (compared[0] / "config.toml").read_text()
    assert "compile = false" in config and "graph = true" in config


def test_failed_runs_are_named_and_the_exit_code_says_so(tmp_path):
    names = ("--models", "mlp", "--attentions", "multi_head,none")
    broken = ("--set", "attention.multi_head.num_heads=7", "--out", tmp_path / "out")
    result = tab("compare", *names, *SMALL, *broken)
    assert result.exit_code == 1
    assert "failed: mlp-multi_head-s0" in flat(result.stderr)
    assert "num_heads=7" in result.output and "mlp-none-s0 done" in result.output
    assert "`mlp-multi_head-s0` failed: ValueError" in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "--attentions", "multihead"], "did you mean 'multi_head'?"),
        (["compare", "--models", "mpl"], "did you mean 'mlp'?"),
        (["compare", "--recipe", "fairr"], "did you mean 'fair'?"),
        (["compare", "--set", "train.learning"], "KEY=VALUE"),
        (["compare", "--set", "train.lrr=1"], "did you mean 'lr'?"),
        (["compare", "--data", "shape"], "shapes"),
        (["compare", "--device", "abacus", "--data", "shapes:10/10"], "abacus"),
        (["compare", "--epochs", "2", "--set", "train.epochs=3"], "disagree"),
        (["compare", "--jobs", "2", "--ray", "local"], "drop jobs"),
        (["compare", "--gpus-per-task", "1"], "are for --ray"),
        (["compare", "--resume", "nowhere"], "no config.toml"),
        (["train", "mlp", "softmax", "--data", "shapes:10/10"], "softmax"),
        (["train", "mlp", "none", "--resume"], "--out DIR"),
        (["report", "nowhere"], "no config.toml"),
        (["data", "nothing"], "nothing"),
        (["compare", "--recipe", "zzz"], "unknown 'zzz'; it takes: "),
        (["compare", "--seeds", "0"], "0"),
        (["compare", "--seed", "2"], "--seeds"),
        (["comparre"], "compare"),
        (["train", "mlp"], "ATTENTION"),
        (["--verson"], "--version"),
        (["bench", "--ops", "linar"], "did you mean 'linear'?"),
    ],
)
def test_bad_input_is_one_red_line_and_exit_code_2(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tab.machine.load", lambda: 0.0)  # a busy machine is told of first
    result = tab(*words)
    assert result.exit_code == 2, result.output
    assert message in flat(result.stderr) and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert not list(tmp_path.glob("r*"))  # neither results/ nor runs/


def test_debug_shows_where():
    result = tab("--debug", "compare", "--attentions", "multihead")
    assert isinstance(result.exception, ValueError)


def test_train_and_its_resume(tmp_path):
    words = ("train", "mlp", "multi_head", *SMALL, "--out", tmp_path / "run")
    result = tab(*words)
    assert result.exit_code == 0, result.output
    assert "epoch 1/1" in result.output and "Test acc." in result.output
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "done"
    assert tab(*words).exit_code == 2  # there is a run already
    again = tab(*words, "--resume")
    assert again.exit_code == 0 and "epoch 1/1" not in again.output


@pytest.mark.parametrize("command", ["train", "report", "robustness"])
def test_threads_are_those_that_compute(command, compared, tmp_path):
    words = {
        "train": ("mlp", "none", *SMALL, "--out", tmp_path / "run"),
        "report": (compared[0],),
        "robustness": (compared[0] / "runs" / "mlp-none-s0", "--images", 10),
    }
    before = torch.get_num_threads()
    try:
        result = tab(command, *words[command], "--threads", before + 1)
        assert result.exit_code == 0, result.output
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    if command == "train":
        run = json.loads((tmp_path / "run" / "run.json").read_text())
        assert run["environment"]["threads"] == before + 1


def test_robustness_of_a_comparison_is_in_its_report(compared):
    out, _ = compared
    result = tab("robustness", out, "--images", 10, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "mlp-multi_head-s0" in result.output and "PGD" in result.output
    assert f"Next: tab report {out}\n" in result.output
    assert tab("report", out).exit_code == 0
    text = (out / "report.md").read_text()
    assert "## Robustness" in text and "PGD-20" in text and "severity.png" in text
    assert tab("robustness", out / "runs" / "mlp-none-s0", "--images", 10).exit_code == 0


def test_robustness_says_what_it_needs(compared, tmp_path):
    out, _ = compared
    result = tab("robustness", out, "--cifar10c", tmp_path)
    assert result.exit_code == 2 and "CIFAR-10's classes" in flat(result.output)
    run = json.loads((out / "runs" / "mlp-none-s0" / "run.json").read_text())
    run["data"]["name"] = "folder:mine"
    (tmp_path / "run.json").write_text(json.dumps(run))
    result = tab("robustness", tmp_path)
    assert result.exit_code == 2 and "give that folder or archive as --data" in flat(result.output)


def test_data_describes():
    result = tab("data", "shapes:20/10")
    assert result.exit_code == 0
    assert "20 train, 10 test" in result.output and "not CIFAR-10" in result.output


def test_doctor_lists_every_operator_and_extension():
    from tab.ops import OPS

    result = tab("doctor")
    assert result.exit_code == 0, result.output
    own = [name for name, op in OPS.items() if op.own]  # packed ones run the kernels of these
    for name in (*own, "tab._C", "tab._C_cuda", "tab._host", "triton", "CUDA toolkit"):
        assert name in result.output


def test_help_and_version_do_not_wait_for_torch():
    program = (
        "import sys; sys.argv = ['tab', *{!r}]\n"
        "from tab.cli.main import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    said = [(["--help"], "compare"), (["--version"], "tab 0"), (["compare", "--help"], "--seeds")]
    said += [(["bench", "steps", "--help"], "--batch"), (["sweep", "--help"], "--budget")]
    for options, text in said:
        command = [sys.executable, "-c", program.format(options)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0 and text in done.stdout, done.stderr


def test_the_package_still_offers_its_functions():
    program = "import tab; tab.linear_attention; tab.use_backend; tab.layers; from tab import *"
    program += "; linear_attention; assert 'linear_attention' in tab.__all__; tab.nothing"
    done = python("-W", "ignore", "-c", program)
    assert "module 'tab' has no attribute 'nothing'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_control_c_and_sigterm_exit_with_the_command_to_go_on(sent, code, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tab", "compare", "--models", "mlp", "--attentions", "none"]
    small = ["5000" if word == "1" else word for word in SMALL]  # epochs
    process = subprocess.Popen(
        [*command, *small, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    rows = out / "runs/mlp-none-s0/rows.jsonl"
    assert until(lambda: rows.exists() or process.poll() is not None)
    process.send_signal(sent)
    _, text = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, text
    assert f"tab compare --resume {out}" in text and "Traceback" not in text


def test_check_prints_what_is_the_same():
    given = ("--models", "mlp", "--attentions", "none,multi_head,local", "--set")
    text = flat(tab("check", "--recipe", "published", *given, "model.mlp.hidden=16").stdout)
    assert "MLP: Multi-Head and Local are the same function on the same weights" in text
    assert "no gradient reaches Q, K of Multi-Head and Local" in text
    assert "Same function as" in text and "Next: tab compare --recipe=published" in text


def test_check_matches_sizes_for_the_classes_of_the_data(tmp_path, monkeypatch):
    seen = []

    def identity(recipe, models, attentions, *, classes, progress):
        seen.append(classes)
        return Identity([], [])

    monkeypatch.setattr("tab.analysis.same_function.identity", identity)
    for data in ([], ["--data", build(tmp_path / "fruit")]):
        assert tab("check", *data).exit_code == 0
    assert seen == [10, len(CLASSES)]


def test_every_help_text_is_a_sentence_that_begins_with_its_noun():
    def texts(command, name):
        for parameter in command.params:
            yield f"{name} {parameter.name}", getattr(parameter, "help", None)
        for below, inner in getattr(command, "commands", {}).items():
            yield f"{name} {below}", inner.help
            yield from texts(inner, f"{name} {below}")

    for name, text in texts(typer.main.get_command(app), "tab"):
        assert text, f"{name} has no help"
        assert text[0].isupper() and text.rstrip().endswith((".", "?")), f"{name}: {text}"
        assert text.split()[0] not in ("Of", "To", "That", "With", "Also", "As"), f"{name}: {text}"


def test_compare_says_it_before_it_trains(tmp_path):
    words = ("--recipe", "published", "--models", "mlp", "--attentions", "multi_head,local")
    small = ("--set", "model.mlp.hidden=16", "--set", "train.batch_size=20", "--epochs", "1")
    words += (*small, "--data", "shapes:40/20", "--device", "cpu", "--out", tmp_path / "out")
    text = flat(tab("compare", *words).stdout)
    assert text.index("are the same function") < text.index("epoch 1/1")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## Identity check" in report and "2 names of one function scored" in report
