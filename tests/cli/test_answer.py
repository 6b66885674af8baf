"""What commands answer: JSON, the table alone, names, recipes, completion."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from small_cli import SMALL, flat, tab
from typer.testing import CliRunner

from tab.cli.answer import portable
from tab.cli.main import app
from tab.cli.terminal import console
from tab.doctor import kernel_compile
from tab.doctor.kernel_report import own_arch
from tab.layers import layer_names
from tab.recipe.recipe import load_recipe

# --- --json and --quiet ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("answer") / "grid"
    words = ("--models", "mlp", "--attentions", "none,multi_head", "--out", out)
    return out, tab("compare", *words, *SMALL, "--json")


def test_json_is_all_that_stands_on_standard_output(compared):
    out, result = compared
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["report"] == str(out / "report.html") and found["failed"] == []
    rows = {row["attention"]: row for row in found["rows"]}
    assert set(rows) == {"none", "multi_head"} and rows["multi_head"]["title"] == "Multi-Head"
    assert 0 <= rows["none"]["accuracy_mean"] <= 1 and rows["none"]["time_ratio"] is None
    assert "Multi-Head" in result.stderr and "epoch 1/1" in result.stderr
    # One seed has no verdict: more of them are what comes next.
    assert found["next"].startswith(f"tab compare --recipe={out / 'config.toml'}")
    assert f"Next: {found['next']}\n" in result.stderr and "--seeds=5" in found["next"]


def test_quiet_is_the_table_alone(compared):
    result = tab("report", compared[0], "--quiet")
    assert result.exit_code == 0 and not result.stderr, result.output
    assert result.stdout.startswith("MLP, ") and "Multi-Head" in result.stdout
    assert "Next" not in result.stdout and "Report" not in result.stdout
    both = tab("report", compared[0], "--quiet", "--json")
    assert json.loads(both.stdout) and not both.stderr


def test_what_one_command_was_told_is_forgotten_by_the_next(compared):
    tab("report", compared[0], "--quiet", "--json")
    assert not console.quiet and not console.stderr
    assert "Next: " in tab("report", compared[0]).stdout


def test_json_holds_no_nan_and_no_path():
    nan = float("nan")
    found = portable({("mlp", "none"): [nan, 1.5], "where": compared.__module__, "at": None})
    assert found == {"mlp-none": [None, 1.5], "where": compared.__module__, "at": None}


# --- names, recipes, help, completion -------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, name",
    [("attentions", "dwconv"), ("ops", "linformer"), ("recipes", "quick"), ("models", "vit")],
)
def test_list_names_what_the_other_commands_take(kind, name):
    assert any(line.startswith(name) for line in tab("list", kind).stdout.splitlines())
    listed = [row["name"] for row in json.loads(tab("list", kind, "--json").stdout)[kind]]
    assert name in listed
    if kind == "attentions":
        assert listed == layer_names()


def test_list_of_no_kind_is_of_all():
    listed = json.loads(tab("list", "--json").stdout)
    assert [*listed] == ["attentions", "ops", "recipes", "models"] and all(listed.values())


def test_list_of_something_else_names_the_kinds():
    result = tab("list", "layers")
    assert result.exit_code == 2 and "attentions" in result.stderr


def test_a_recipe_that_is_shown_can_be_fed_back(tmp_path):
    shown = tab("recipe", "show", "quick", "--set", "train.lr=0.0123")
    assert shown.exit_code == 0, shown.output
    path = tmp_path / "mine.toml"
    path.write_text(shown.stdout)
    assert load_recipe(path).tables == load_recipe("quick", {"train.lr": 0.0123}).tables
    assert tab("recipe", "show", path).stdout == shown.stdout
    assert (
        json.loads(tab("recipe", "show", path, "--json").stdout)["recipe"]["train"]["lr"] == 0.0123
    )


def test_completion_knows_commands_options_and_names():
    for line, at, wanted in (
        ("tab rec", 1, "recipe"),
        ("tab compare --att", 2, "--attentions"),
        ("tab compare --recipe fair_", 3, "fair_flops"),
        ("tab compare --models cnn,v", 3, "cnn,vit"),
    ):
        env = {"_TAB_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(at)}
        assert wanted in CliRunner().invoke(app, [], env=env, prog_name="tab").stdout.split()
    assert "--install-completion" in tab("--help").stdout


def test_the_kernels_of_the_doctor_are_tables_and_rows(monkeypatch):
    row = {"op": "linear", "kernel": "forward", "config": "fp32 BLOCK=64 num_warps=4", "arch": 90}
    row |= {"without": "mask", "registers": 168, "spilled": 0, "shared": 4096, "limit": 232448}
    row |= {"precision": "bf16", "blocks": 3, "warps": 12}
    wanted, found = [], [row, {**row, "spilled": 8}]

    def report_rows(archs, progress, every):
        wanted.append((archs, every))
        progress(1, 1, "forward, sm_90")
        return found

    monkeypatch.setattr("tab.doctor.kernel_report.report_rows", report_rows)
    monkeypatch.setattr("tab.doctor.kernel_report.own_arch", lambda: 90)
    result = tab("doctor", "--kernels", "--json")
    answer = json.loads(result.stdout)
    assert result.exit_code == 0 and answer["faults"] == []
    assert [each["spilled"] for each in answer["kernels"]] == [0, 8]
    assert answer["backends"]["linear_fwd"]["reference"] is None
    assert "4 of 227" in result.stderr and "12 in 3" in result.stderr
    assert re.fullmatch(r"\d+\.\d+", answer["versions"]["ptxas, sm_90"])
    linear = next(each for each in answer["floors"] if each["op"] == "linear_fwd")
    assert linear["floor_us"] > 1 and "512×8×64×64" in result.stderr
    found.append({**row, "spilled": 4096})
    result = tab("doctor", "--kernels", "--arch", "all", "--every-launch")
    assert result.exit_code == 1 and wanted == [((90,), False), ((80, 90, 100), True)]
    assert "4096 bytes spilled a thread" in flat(result.output)
    assert (
        tab("doctor", "--every-launch").exit_code == tab("doctor", "--arch", "all").exit_code == 2
    )
    result = tab("doctor", "--kernels", "--arch", "hopper")
    assert result.exit_code == 2 and "hopper is none of sm_80, sm_90, sm_100, all" in flat(
        result.output
    )


def test_the_doctor_goes_on_where_triton_has_no_assembler(monkeypatch):
    """As Triton for AMD's GPUs, which PyTorch calls CUDA, too."""
    pytest.importorskip("triton")

    def none(arch):
        raise ImportError("No module named 'triton.backends.nvidia'")

    monkeypatch.setattr(kernel_compile, "assembler", none)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 4))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "MI300X")
    said = tab("doctor")
    assert said.exit_code == 0 and "not found: No module named" in flat(said.output)


def test_the_doctor_doubts_an_old_assembler_on_hopper(monkeypatch):
    pytest.importorskip("triton")
    made = {80: "12.9", 90: "12.9", 100: "13.3"}
    monkeypatch.setattr(
        kernel_compile,
        "assembler",
        lambda arch: SimpleNamespace(path=f"/for/{arch}", version=made[arch]),
    )
    assert [*map(kernel_compile.doubt, (80, 100))] == [None, None]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    said = flat(tab("doctor").output)
    assert "ptxas 12.9 for sm_90" in said and "set TRITON_PTXAS_PATH=/for/100" in said
    made[100] = "12.9"
    assert kernel_compile.doubt(90).endswith("TRITON_PTXAS_PATH=PATH, that of a newer one")
    made[90] = "13.3"
    assert kernel_compile.doubt(90) is None


def test_the_doctor_compiles_for_the_gpu_that_is_here(monkeypatch):
    for visible, capability, arch in (
        (False, None, 90),
        (True, (8, 0), 80),
        (True, (10, 0), 100),
        (True, (8, 9), 90),  # its limits are not known
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda visible=visible: visible)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda which=capability: which)
        assert own_arch() == arch
