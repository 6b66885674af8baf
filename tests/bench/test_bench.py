"""The benchmark itself: the wrong is not timed, work is counted right."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from tab.bench.benchmark import Contestant, compiled
from tab.bench.cases import Case
from tab.bench.measure import measure
from tab.bench.ops import linformer
from tab.bench.registry import benchmark, benchmarks, cases, names, problem
from tab.bench.results import environment, load, save
from tab.bench.roofline import Roofline
from tab.bench.rows import Row, percentiles, speedup
from tab.cli.bench import app
from tab.layers.linformer import LinformerAttention

ROOF = Roofline(flops=1e11, bandwidth=1e10)
TINY = Case("linear", "tiny")


def race(monkeypatch, f):
    monkeypatch.setattr(benchmark("linear"), "pytorch", lambda p: iter([Contestant("x", f)]))
    only = {"tab reference", "x"}.__contains__
    rows = measure(TINY, ROOF, directions=("forward", "both"), budget=0.01, only=only)
    return {row.contestant: row for row in rows}


def test_the_wrong_is_not_timed(monkeypatch):
    rows = race(monkeypatch, lambda p: lambda q, k, v: q * k * v)
    assert rows["x"].skipped.startswith("wrong") and not rows["x"].seconds
    assert rows["tab reference"].error < 1e-5 and rows["tab reference"].seconds["both"]


def test_the_broken_says_how(monkeypatch):
    def broken(q, k, v):
        raise TypeError("no such thing")

    rows = race(monkeypatch, lambda p: broken)
    assert rows["x"].skipped == "TypeError: no such thing"


@pytest.mark.parametrize("exact", (True, False))
def test_nan_is_wrong_wherever_it_stands(monkeypatch, exact):
    """Where rivals may approximate, too."""
    monkeypatch.setattr(benchmark("linear"), "exact", exact)

    def lost(p):
        right = p.benchmark.ours(p, "reference")
        return lambda q, k, v: right(q, k + (k * torch.nan).detach() * 0, v)

    def gradient(p):
        right = p.benchmark.ours(p, "reference")
        return lambda q, k, v: right(q, k, NanBackward.apply(v))

    for build in (lost, gradient):
        assert race(monkeypatch, build)["x"].skipped.startswith("wrong")


def test_nan_in_a_file_has_no_times(tmp_path):
    """As files from before it was judged wherever rivals may approximate."""
    rows = [Row("performer/x", name, error=e, seconds={"forward": [1.0]})
            for name, e in (("lost", math.nan), ("right", 1e-7))]  # fmt: skip
    save(tmp_path / "old.json", rows, None, {}, "tab bench", None)
    lost, right = load(tmp_path / "old.json")[1]
    assert lost.skipped.startswith("wrong") and not lost.seconds
    assert right.skipped is None and right.seconds


class NanBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    def detached(p):
        right = p.benchmark.ours(p, "reference")
        return lambda q, k, v: right(q, k.detach() + 0 * k, v)

    assert race(monkeypatch, detached)["x"].skipped.startswith("wrong")


@pytest.mark.parametrize(
    ("op", "causal"),
    [(c.op, c.causal) for c in cases(names(), ["tiny"], (False, True))],
)
def test_every_contestant_of_every_op_is_right(op, causal):
    rows = measure(
        Case(op, "tiny", causal=causal),
        ROOF,
        directions=("both",),
        budget=0.0,
        min_rounds=1,
        max_rounds=1,
        only=lambda name: "compile" not in name and "flex" not in name,
    )
    wrong = {row.contestant: row.skipped for row in rows if row.skipped}
    absent = ("not built", "not installed", "GPU", "has no")
    assert not {n: why for n, why in wrong.items() if not any(a in why for a in absent)}


def test_window_pairs_are_counted():
    p = problem(Case("local", "tiny"))
    _, h, n, d = p.case.shape
    i = torch.arange(n)
    dense = ((i[:, None] - i).abs() <= p.fixed["window"]).sum().item()
    assert p.benchmark.work(p)["forward"][0] == 4 * d * p.case.shape[0] * h * dense


def test_percentiles_and_paired_ratio():
    assert percentiles([1.0, 2.0, 3.0])[1] == 2.0
    assert speedup([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == (2.0, 2.0, 2.0)


def row(times, contestant="tab"):
    return Row("case", contestant, error=1e-7, seconds={"forward": times})


def test_saved_runs_come_back_and_others_are_refused(tmp_path):
    path = tmp_path / "a.json"
    save(path, [row([1.0, 2.0])], ROOF, environment("cpu"), "tab bench")
    record, rows = load(path)
    assert rows == [row([1.0, 2.0])] and record["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"rows": [{"nonsense": 1}]}, "nonsense"),
        ({"rows": [{"case": "a", "contestant": "b", "seconds": {"both": ["1"]}}]}, "seconds"),
        ({"rows": 3}, "rows"),
        ({"environment": []}, "environment"),
        (b"\xff{", "not JSON"),
        (b"[]", "it = "),
    ],
)
def test_other_files_are_refused_in_one_line(damage, words, tmp_path):
    path = tmp_path / "a.json"
    record = save(path, [row([1.0])], ROOF, environment("cpu"), "tab bench")
    path.write_bytes(damage if isinstance(damage, bytes) else json.dumps(record | damage).encode())
    with pytest.raises(ValueError, match=r"a\.json is damaged or foreign.*tab bench --out") as seen:
        load(path)
    assert words in str(seen.value) and "\n" not in str(seen.value)


def test_command_line(tmp_path):
    out = tmp_path / "new.json"
    options = "--ops linear --sizes tiny --contestants eager --directions forward --budget 0.01"
    options += " --processes 2"
    done = CliRunner().invoke(app, [*options.split(), "--out", str(out)])
    assert done.exit_code == 0 and "eager" in done.output, done.output
    assert out.with_suffix(".png").stat().st_size > 1000
    record = json.loads(out.read_text())
    for file, took in (("old.json", 1.0), ("slow.json", 2.0)):  # not of a clock
        for entry in record["rows"]:
            for d, times in entry["seconds"].items():
                entry["pace"][d] = [1.0] * len(entry["pace"][d])
                entry["seconds"][d] = [took * (1 + i / 10_000) for i in range(len(times))]
        (tmp_path / file).write_text(json.dumps(record))
    files = [str(tmp_path / file) for file in ("old.json", "slow.json")]
    done = CliRunner().invoke(app, ["compare", *files, "--alpha", "0.05"])
    assert done.exit_code == 1 and "slower" in done.output


def test_linformer_is_what_its_layer_computes():
    """From the tokens on, by the layer's own weights, in the cheaper order; so are its rivals."""
    p = problem(Case("linformer", "tiny"))
    x, qkv, e = p.inputs
    (_, h, n, d), k = p.case.shape, e.shape[1]
    layer = LinformerAttention(h * d, seq_len=n, num_heads=h, k=k)
    with torch.no_grad():
        layer.qkv.weight.copy_(qkv)
        layer.E.copy_(e[None])
        layer.out.weight.copy_(torch.eye(h * d))
        layer.out.bias.zero_()
    o = p.benchmark.ours(p, "auto")(x, qkv, e)
    torch.testing.assert_close(o.transpose(1, 2).flatten(2), layer(x))
    torch.testing.assert_close(linformer.eager(x, qkv, e, heads=h), o)


def test_a_result_bears_the_commit_of_its_beginning(tmp_path, monkeypatch):
    """Others commit while it runs: the code that was measured is the one that was imported."""
    commits = iter(["before", *["after"] * 99])
    monkeypatch.setattr("tab.bench.results._commit", lambda: next(commits))
    out = tmp_path / "m.json"
    done = CliRunner().invoke(
        app, ["memory", "--ops", "linear", "--longest", "2048", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["environment"]["commit"] == "before"


# --- which ops there are --------------------------------------------------------------------------


def test_every_op_with_kernels_of_its_own_is_named_like_its_file():
    """No list says which ops there are: whoever adds the file has added the op."""
    assert set(names()) >= {"linear", "performer", "local", "sparse", "mla", "linformer"}
    for name, found in benchmarks().items():
        assert found.op is None or found.op.name.startswith(name), name


def test_an_unknown_op_is_refused():
    with pytest.raises(ValueError, match=r"op 'liner'; did you mean 'linear'\? Choose from"):
        benchmark("liner")


def test_who_is_no_longer_compiled_is_an_error(monkeypatch):
    """PyTorch says so in a log and runs the function as it stands."""
    monkeypatch.setattr("torch._dynamo.config.recompile_limit", 8)
    f = compiled(lambda x: 2 * x, backend="eager")
    for n in range(2, 12):
        assert torch.equal(f(torch.ones(n)), 2 * torch.ones(n))
    monkeypatch.setattr("torch._dynamo.config.recompile_limit", 10)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        f(torch.ones(12))
