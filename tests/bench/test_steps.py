"""Training steps, memory against N, decoding and the page: what the rest of `tab bench` shows."""

import json
from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

from tab.analysis.steps import Subject, add_memory, attending, difference, steps, subjects, twin
from tab.bench import page
from tab.bench.cases import Case
from tab.bench.measure import measure
from tab.bench.ops import linear
from tab.bench.peak_memory import entrants, growth, memory
from tab.bench.registry import cases, problem
from tab.bench.roofline import Roofline
from tab.bench.rows import Row
from tab.cli.bench import app
from tab.cli.bench_tables import memory_table, steps_table
from tab.data.load import load_dataset
from tab.models.image_model import build_model
from tab.recipe.recipe import load_recipe
from tab.train.optimizers import AdamW
from tab.train.steps import Steps
from tab.train.training_run import TrainingRun

ROOF = Roofline(flops=1e11, bandwidth=1e10)
ONCE = {"batch": 4, "budget": 0.0, "min_rounds": 1, "max_rounds": 1}
TWINS = {  # and the function of TAB that the layer calls
    "linear": "linear_attention",
    "performer": "performer_attention",
    "sparse": "sparse_attention",
    "local": "local_attention",
    "deepseek_mla": "mla_attention",
}


def quick(model):
    return Subject(load_recipe("quick"), model)


def model_of(attention, model="cnn"):
    return build_model(load_recipe("quick").run_config(model, attention, 0), 10)


@pytest.mark.parametrize("attention", TWINS)
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_twin_attends_alike_in_plain_pytorch(attention, model, monkeypatch):
    ours = model_of(attention, model)
    other = twin(ours)
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert max(difference(ours, other, x)) < 1e-4
    monkeypatch.setattr(f"tab.layers.{attention}.{TWINS[attention]}", None)
    with pytest.raises(TypeError):
        ours(x)
    assert torch.isfinite(other(x)).all()


@pytest.mark.parametrize("attention", ["linear", "deepseek_mla"])
def test_a_twin_attends_so_in_every_block(attention, monkeypatch):
    """Of a model of several blocks only the first did, and half of its time was that of ours."""
    given = {"model.vit.hidden": 16, "model.vit.match": "", "model.vit.depth": 2}
    config = load_recipe("study", given).run_config("vit", attention, 0)
    ours = build_model(config, 10)
    other, x = twin(ours), torch.randn(2, 3, 32, 32)
    assert torch.allclose(ours(x), other(x), atol=1e-4)
    monkeypatch.setattr(f"tab.layers.{attention}.{TWINS[attention]}", None)
    with pytest.raises(TypeError):
        ours(x)
    assert torch.isfinite(other(x)).all()


def test_what_is_pytorch_already_has_no_twin():
    assert twin(model_of("multi_head")) is None and twin(model_of("none")) is None


@pytest.mark.parametrize("attention", TWINS)
def test_a_free_twin_attends_at_no_cost(attention, monkeypatch):
    """What stands around the attention does all of its work, forward and backward."""
    free, x = twin(model_of(attention), "free"), torch.randn(8, 3, 32, 32)
    monkeypatch.setattr(f"tab.layers.{attention}.{TWINS[attention]}", None)
    free(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in free.parameters())
    _, part = attending(free.attention)
    own = [p for name, p in part.named_parameters() if not name.startswith("out.")]
    assert own and not any(p.grad.any() for p in own)


def test_the_ceiling_of_a_step():
    rows = steps(quick("mlp"), ["none", "linear"], ceiling=True, **ONCE)
    assert [row.contestant for row in rows] == ["none", "tab linear", "eager linear", "free linear"]
    for row, seconds in zip(rows, (1.0, 3.0, 6.0, 2.0), strict=True):
        row.seconds["step"] = [seconds]
    shown = steps_table(rows)
    cells = {str(c.header): list(c.cells) for c in shown.columns}
    assert cells["TAB is × eager"][1].startswith("2.00") and cells["Ceiling"][1].startswith("3.00")
    assert cells["Ceiling"][0] == cells["Ceiling"][2] == ""


def test_steps():
    rows = steps(quick("mlp"), ["none", "linear", "multi_head"], **ONCE)
    names = ["none", "tab linear", "eager linear", "tab multi_head"]
    assert [row.contestant for row in rows] == names
    assert {len(row.seconds["step"]) for row in rows} == {1}
    assert {(row.case, row.batch) for row in rows} == {("steps/mlp/quick/b4", 4)}
    assert rows[2].error < 1e-5 and rows[2].gradient_error < 1e-4
    assert steps_table(rows).row_count == 4


def test_a_vit_is_measured_at_each_length():
    small = {"model.vit.hidden": 16, "model.vit.match": ""}
    found = subjects("quick", ["mlp", "vit"], [8, 4], small)
    assert [subject.name for subject in found] == [
        *("steps/mlp/quick", "steps/vit/n16/quick", "steps/vit/n64/quick")
    ]
    rows = [row for subject in found for row in steps(subject, ["linear"], **ONCE)]
    assert [row.tokens for row in rows] == [8] * 3 + [16] * 3 + [64] * 3
    assert len({row.case for row in rows}) == 3 and not any(row.skipped for row in rows)
    with pytest.raises(ValueError, match="--models vit"):
        subjects("quick", ["mlp"], [4])


def test_memory_of_a_step():
    """Masked attention holds the mask, N² bytes and more; what is wrong is not measured."""
    small = {"model.vit.hidden": 16, "model.vit.match": "", "attention.local.num_heads": 2}
    rows = [Row("steps", name, batch=2, tokens=1024) for name in ("tab local", "eager local")]
    wrong = Row("steps", "eager linear", skipped="wrong")
    add_memory([*rows, wrong], subjects("quick", ["vit"], [1], small)[0])
    ours, eager = (row.peak_bytes for row in rows)
    assert 1e6 < ours < eager - 1024**2 and wrong.peak_bytes is None


def test_a_step_trains():
    rows = []
    real = AdamW.step

    def step(self, *args):
        rows.append(any(p.grad is not None for g in self.param_groups for p in g["params"]))
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdamW, "step", step)
        steps(quick("mlp"), ["none"], **ONCE)
    assert rows == [True] * 2  # one to warm up


def test_a_step_is_the_one_of_training(monkeypatch, tmp_path):
    """The same method on a model placed alike, whoever steps."""
    found = []
    real = Steps._step

    def step(self, x, y):
        conv = next(p for p in self.model.parameters() if p.dim() == 4)
        placed = conv.is_contiguous(memory_format=torch.channels_last)
        found.append((placed, self.optimizer.defaults["fused"], x.shape, x.stride()))
        real(self, x, y)

    monkeypatch.setattr(Steps, "_step", step)
    steps(quick("cnn"), ["linear"], **ONCE)
    timed, found = found, []
    changes = {"train.batch_size": 4, "train.epochs": 1, "data.images": 20, "data.validation": 10}
    config = load_recipe("quick", changes)
    dataset = load_dataset("shapes:100/20")
    run = TrainingRun(config.run_config("cnn", "linear", 0), dataset, torch.device("cpu"), tmp_path)
    run.epoch()
    assert len(timed) == 6 and len(found) == 5  # three contestants, each warmed up once
    assert set(timed) == set(found)


def test_a_wrong_twin_is_not_timed(monkeypatch):
    right = linear.eager
    monkeypatch.setattr(linear, "eager", lambda *x, **options: 1.01 * right(*x, **options))
    rows = steps(quick("cnn"), ["linear"], **ONCE)
    assert rows[2].skipped.startswith("wrong") and not rows[2].seconds
    table = steps_table(rows)
    assert table.row_count == 2 and "eager linear: wrong" in table.note


# --- memory ---------------------------------------------------------------------------------------

NAMES = ("tab", "chunked", "sdpa+mask")


def memory_row(n, size):
    return Row(f"local/n{n}/full/float32", "tab", peak_bytes=size)


def test_growth_is_the_exponent():
    assert growth([memory_row(n, 7 * n**2) for n in (1024, 2048, 4096)]) == pytest.approx(2)
    assert growth([memory_row(n, 7 * n) for n in (1024, 8192)]) == pytest.approx(1)
    assert growth([memory_row(1024, 7)]) is None


def test_no_contestant_pays_for_the_mask_of_another():
    """The usual sliding window holds no N×N mask, so it grows as N; SDPA's is N² bytes, once."""
    rows = memory("local", (2048, 4096), available=1e12)
    sizes = {name: [row.peak_bytes for row in rows if row.contestant == name] for name in NAMES}
    assert sizes["chunked"][1] < 2.5 * sizes["chunked"][0]
    assert 3 < sizes["sdpa+mask"][1] / sizes["sdpa+mask"][0] < 5


def test_memory_is_measured_and_what_would_not_fit_is_left_out():
    rows = memory("linear", (1024, 2048, 4096), available=8e6)
    by = {(row.contestant, row.case.split("/")[1]): row for row in rows}
    assert {name for name, _ in by} == set(entrants("linear")) == {"tab", "eager"}
    outputs = 4 * 1024 * 64 * 4 * 4  # o, dq, dk, dv in float32: H·N·D·4 bytes each
    assert outputs <= by["tab", "n1024"].peak_bytes < 40 * outputs
    assert "may" in by["eager", "n4096"].skipped and by["eager", "n4096"].peak_bytes is None
    assert memory_table(rows).row_count == 2


def test_what_fails_in_the_other_process_says_how():
    with pytest.raises(RuntimeError, match="KeyError"):
        memory("linear", (1000,))  # no such size


# --- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["linear", "mla"])
def test_decoding_is_right_and_forward_only(op):
    once = {"budget": 0.0, "min_rounds": 1, "max_rounds": 1}
    only = lambda name: "compile" not in name  # noqa: E731
    rows = measure(Case(op, "decode"), ROOF, directions=("forward", "both"), only=only, **once)
    timed = [row for row in rows if not row.skipped]
    assert len(timed) >= 3 and all(set(row.seconds) == {"forward"} for row in timed)
    assert not [row.skipped for row in rows if row.skipped and "no cpp kernel" not in row.skipped]


def test_decode_work_is_counted():
    p = problem(Case("mla", "decode"))
    flops, moved = p.benchmark.work(p)["forward"]
    cache = p.inputs[2]
    b, h, n, _ = p.case.shape
    assert cache.nbytes < moved < 1.2 * cache.nbytes
    assert flops > 2 * b * h * n * cache.shape[-1]


def test_only_some_ops_decode():
    found = cases(["linear", "local"], ["tiny", "decode"], (False, True))
    assert len(found) == 5  # local: tiny twice; linear: tiny twice, decode once
    with pytest.raises(ValueError, match="linear, mla"):
        cases(["local"], ["decode"])


def test_projection_of_half_types_is_float32():
    case = Case("performer", "tiny", dtype=torch.bfloat16)
    rows = measure(case, ROOF, directions=("forward",), budget=0.0, max_rounds=1, only="tab".__eq__)
    assert rows[0].skipped is None and rows[0].error < 0.1


# --- page -----------------------------------------------------------------------------------------


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(dict(attrs).get("data-v"))

    def handle_data(self, data):
        self.text += data


def test_page(tmp_path):
    rows = [
        Row("a", "tab", seconds={"both": [1.0, 2.0, 3.0]}, batch=8, floor={"both": 1.0}),
        Row("a", "<eager>", seconds={"both": [4.0, 4.0, 4.0]}, error=1e-6),
        Row("a", "peer", skipped="no GPU & no hope"),
    ]
    record = {"command": "tab bench", "environment": {"torch": "2"}, "roofline": None}
    page.write_page(tmp_path / "x.html", record, rows)
    assert [f.name for f in tmp_path.iterdir()] == ["x.html"]
    cells = Cells()
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    cells.feed(text)
    assert len({len(row) for row in cells.rows}) == 1 and len(cells.rows) == 4
    assert cells.rows[2][1:4] == ["<eager>", "4000.0", "2.0"]  # ms; tab is twice as fast
    assert cells.rows[1][4] == "4.0" and "GFLOP/s" not in text  # of which nothing is known
    assert "no GPU & no hope" in cells.text  # 8 images in 2 s
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # needs nothing else


def test_commands(tmp_path):
    out = tmp_path / "s.json"
    options = "--recipe quick --models mlp --attentions linear --batch 2 --budget 0 --processes 1"
    done = CliRunner().invoke(app, ["steps", *options.split(), "--out", str(out)])
    assert done.exit_code == 0 and "eager linear" in done.output, done.output
    assert len(json.loads(out.read_text())["rows"]) == 3
    assert "eager linear" in out.with_suffix(".html").read_text()
    done = CliRunner().invoke(app, ["memory", "--longest", "5"])
    assert isinstance(done.exception, ValueError) and "at least 2048" in str(done.exception)
