"""TAB from Python: the same files as from the shell, and objects that show what they hold."""

import inspect
import pickle
import shutil
import subprocess
import sys

import pytest
import rich
from forks import python
from matplotlib.figure import Figure
from small_grid import SMALL, numbers

import tab
import tab.compare.driver  # which binds the package to the name of the function
from tab import plugins
from tab.api import Comparison, Sweep, Timings
from tab.api.rows import Rows
from tab.bench.rows import Row
from tab.cli.main import app
from tab.layers import _registry

GIVEN = {"recipe": "quick", "data": "shapes:100/20", "overrides": SMALL | {"train.epochs": 1}}
NAMES = ["none", "self", "linear"]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Comparison:
    """Treat as read-only."""
    out = tmp_path_factory.mktemp("compare") / "out"
    return tab.compare(NAMES, "mlp", seeds=2, out=out, device="cpu", tell=None, **GIVEN)


# --- import tab -----------------------------------------------------------------------------------


def test_import_loads_nothing_that_computes_and_the_ops_no_compiler():
    program = (
        "import sys, tab; heavy = {'torch', 'numpy', 'pandas', 'matplotlib', 'rich', 'typer'}; "
        "print(sorted(heavy & {*sys.modules}), end=' '); import tab.ops, tab.layers, tab.train; "
        "print('torch._dynamo' in sys.modules)"  # it takes two thirds again of what torch takes
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "[] False"


@pytest.mark.parametrize("name", ["bench", "compare", "sweep"])
def test_a_package_that_is_called_as_a_function(name):
    """Whatever of it has been imported: completion shows the signature, and its modules stay."""
    package, function = getattr(tab, name), getattr(tab.api, name)
    assert callable(package) and inspect.signature(package) == inspect.signature(function)
    assert package.__doc__ == function.__doc__
    assert pickle.loads(pickle.dumps(package)) is package
    assert tab.compare.driver.compare is not tab.compare


@pytest.mark.parametrize("first", ["import tab.compare.plan", "from tab import compare", "pass"])
def test_it_can_be_called_whatever_was_imported_first(first):
    program = f"import tab; {first}; assert callable(tab.compare), tab.compare; print(tab.compare)"
    done = python("-c", program)
    assert done.stdout.startswith("<module 'tab.compare'"), done.stderr


# --- a comparison ---------------------------------------------------------------------------------


def test_it_is_what_the_shell_writes(comparison, tmp_path):
    from typer.testing import CliRunner

    sets = [f"--set={key}={value}" for key, value in GIVEN["overrides"].items()]
    where = ["--data", GIVEN["data"], "--device", "cpu", "--out", str(tmp_path / "out")]
    what = ["--attentions", ",".join(NAMES), "--models", "mlp", "--recipe", "quick", "--seeds", "2"]
    done = CliRunner().invoke(app, ["compare", *what, *where, *sets])
    assert done.exit_code == 0, done.output
    assert numbers(comparison.directory) == numbers(tmp_path / "out")


def test_summary(comparison):
    rows = comparison.rows()
    assert [row["attention"] for row in rows] == [e.attention for e in comparison.ranked("mlp")]
    assert {row["attention"] for row in rows} == {*NAMES}
    by_name = {row["attention"]: row for row in rows}
    mean = sum(run.accuracy for run in comparison.runs if run.attention == "self") / 2
    assert by_name["self"]["accuracy_mean"] == pytest.approx(mean)
    assert by_name["none"]["difference"] is None and by_name["none"]["time_ratio"] is None
    assert by_name["linear"]["parameters"] > by_name["none"]["parameters"]


def test_summary_is_a_dataframe_where_pandas_is(comparison, monkeypatch):
    found = comparison.summary
    assert type(found).__module__.startswith("pandas") and len(found) == len(NAMES)
    assert [*found.columns] == [*comparison.rows()[0]]
    monkeypatch.setitem(sys.modules, "pandas", None)  # as where it is not installed
    assert isinstance(comparison.summary, Rows) and comparison.summary == comparison.rows()


def test_it_shows_itself(comparison, capsys):
    text, html = repr(comparison), comparison._repr_html_()
    rich.print(comparison)
    for shown in (text, html, capsys.readouterr().out):
        assert "6 of 6 runs done" in shown and "Linear" in shown
    parts = [*comparison.ranked("mlp"), *comparison.runs]
    assert max(len(repr(part)) for part in parts) < 1000  # no table of epochs
    assert html.count("<tr>") == 1 + len(NAMES) and "summary" in dir(comparison)


def test_plot_is_a_figure_that_stands_alone(comparison, tmp_path, monkeypatch):
    """It is drawn without pyplot: the caller's backend and open figures stay as they are."""
    import matplotlib

    monkeypatch.chdir(tmp_path)
    backend = matplotlib.get_backend()
    figure = comparison.plot("mlp")
    assert isinstance(figure, Figure) and figure._repr_png_().startswith(b"\x89PNG")
    assert not [*tmp_path.iterdir()] and matplotlib.get_backend() == backend
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()
    words = {text.get_text() for axis in figure.axes for text in axis.texts}
    assert {"Linear", "Self-Attention", "undecided"} <= words
    with pytest.raises(ValueError, match=r"'cnn'.*has mlp"):
        comparison.plot("cnn")


def test_load_and_resume(comparison, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(comparison.directory, out)
    shutil.rmtree(out / "runs" / "mlp-linear-s1")
    found, told = tab.load_study(out), []
    assert isinstance(found, Comparison) and "5 of 6" in found.headline()
    whole = found.resume(tell=told.append)
    assert tab.load_model(whole.runs[0].path).training is False
    assert "6 of 6" in whole.headline() and numbers(out) == numbers(comparison.directory)
    assert len(told) == 7 and told[-1].startswith("[6/6] mlp-linear-s1 done")


def test_report(comparison, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(comparison.directory, out)
    path = tab.load_study(out).report()
    assert path == out / "report.html" and "Linear" in path.read_text(encoding="utf-8")


def test_a_run_that_fails_is_told_of(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ArithmeticError("nothing adds up")

    monkeypatch.setattr("tab.compare.driver.train", broken)
    with pytest.warns(UserWarning, match=r"failed: mlp-self-s0; error\.txt"):
        found = tab.compare("self", "mlp", out=tmp_path / "out", tell=None, **GIVEN)
    assert found.rows()[0]["notes"] == "failed (seed 0)"
    with pytest.raises(ValueError, match="nothing to draw yet"):
        found.plot()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attentions": "perfomer"}, "did you mean 'performer'"),
        ({"models": "cmn"}, "'cmn'"),
        ({"recipe": "quik"}, "'quik'"),
        ({"epochs": 3}, "epochs=3 and overrides disagree"),
        ({"watch": ["w&b"]}, "w&b"),
        ({"seeds": 0}, "seeds = 0"),
        ({"jobs": 0}, "jobs = 0"),
        ({"attentions": []}, r"names are \[\]: give at least one"),
        ({"models": ()}, r"names are \[\]: give at least one"),
    ],
)
def test_errors_come_before_anything_is_written(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        tab.compare(
            **{"attentions": "self", "models": "mlp", **GIVEN, **changes}, out=tmp_path / "x"
        )
    assert not (tmp_path / "x").exists()


def test_a_sweep_is_not_begun_either(tmp_path):
    pytest.importorskip("optuna")
    with pytest.raises(ValueError, match="jobs = 0"):
        tab.sweep(
            "self", "mlp", recipe="quick", data="shapes:100/20", space="tuning", images=60,
            validation=20, configurations=1, epochs=(1,), jobs=0, out=tmp_path / "x", tell=None,
        )  # fmt: skip
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"seeds": True}, "'seeds' must be int, not bool; got True"),
        ({"seeds": 2.5}, r"'seeds' must be int, not float; got 2\.5"),
        ({"overrides": ["train.lr=1"]}, "'overrides' must be Mapping or None, not list"),
        ({"plugins": "mine.py"}, "'plugins' must be Iterable of str or Path, not str"),
        ({"executor": "ray"}, "'executor' must be Executor or None, not str"),
    ],
)
def test_other_types_come_before_anything_is_written(tmp_path, given, words):
    with pytest.raises(TypeError, match=rf"compare\(\): argument {words}"):
        tab.compare("self", "mlp", **{**GIVEN, **given}, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_attention_of_a_file(tmp_path, monkeypatch):
    """A process that only reads the results finds it again."""
    monkeypatch.setattr(_registry, "_layers", dict(_registry._layers))  # for this test alone
    monkeypatch.setattr(plugins, "_loaded", {})
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "import tab\n\n\n"
        '@tab.layers.register_attention("api_mine")\n'
        "class Mine(tab.layers.HeadsAttention):\n"
        '    title = "My own"\n\n'
        "    def attend(self, q, k, v, key_mask):\n"
        "        return v\n"
    )
    out = tmp_path / "out"
    tab.compare("api_mine", "mlp", out=out, plugins=[plugin], tell=None, **GIVEN)
    program = f"import tab; print(tab.load_study({str(out)!r}).rows()[0]['title'])"
    done = python("-c", program)
    assert done.stdout.strip() == "My own", done.stderr


def test_images_of_the_size_that_the_recipe_says(tmp_path):
    sized = {**GIVEN, "overrides": GIVEN["overrides"] | {"data.size": 24}}
    found = tab.compare("self", "mlp", out=tmp_path, tell=None, **sized)
    assert found.runs[0].status == "done" and found.resume(tell=None).rows() == found.rows()


def test_a_directory_is_not_begun_twice(comparison):
    with pytest.raises(ValueError, match="already holds a comparison"):
        tab.compare("self", "mlp", out=comparison.directory, **GIVEN)


# --- a sweep --------------------------------------------------------------------------------------


def test_a_sweep(tmp_path):
    pytest.importorskip("optuna")
    halving = {"configurations": 2, "epochs": (1, 2), "eta": 2, "images": 60, "validation": 20}
    given = {k: v for k, v in GIVEN.items() if k != "overrides"} | {"overrides": SMALL}
    told = []
    found = tab.sweep(
        ["self", "linear"],
        "mlp",
        space="tuning",
        out=tmp_path,
        tell=told.append,
        **given,
        **halving,
    )
    assert [row["attention"] for row in found.rows()] == ["self", "linear"]
    assert all(row["configurations"] == 2 and row["epochs"] == 2 for row in found.rows())
    assert found.rows()[0]["lr"] > 0 and len(told) == 1 + 2 * (2 + 1)
    assert "Linear" in repr(found) and found.winners.exists()
    assert isinstance(found.plot(), Figure)
    again = tab.load_study(tmp_path)
    assert isinstance(again, Sweep) and again.rows() == found.rows()
    assert again.resume(tell=None).rows() == found.rows()


# --- a benchmark ----------------------------------------------------------------------------------


def _row(contestant: str, seconds: list[float], **more) -> Row:
    return Row(
        "linear/tiny/full/float32", contestant, error=1e-7, seconds={"forward": seconds},
        floor={"forward": 1e-3}, rounds={"forward": [len(seconds)]}, **more,
    )  # fmt: skip


def test_timings():
    """Milliseconds, how many times faster TAB is within each round, and who was skipped."""
    measured = [_row("tab", [2e-3, 4e-3, 3e-3]), _row("eager", [6e-3, 6e-3, 6e-3])]
    measured.append(Row("linear/tiny/full/float32", "peer", skipped="not installed"))
    found = Timings(measured, {"cpu": "a CPU", "threads": 2, "torch": "2"}, None)
    ours, eager, peer = found.rows()
    assert (ours["ms"], ours["speedup"], ours["over_floor"]) == (3.0, None, 3.0)
    assert (eager["ms"], eager["speedup"], eager["direction"]) == (6.0, 2.0, "forward")
    assert peer["skipped"] == "not installed" and peer["ms"] is None
    assert found.directory is None and "a CPU, 2 threads" in repr(found)
    assert isinstance(found.plot(), Figure)


@pytest.mark.parametrize(
    "changes", [{"ops": "liner"}, {"sizes": "tini"}, {"directions": "sideways"}]
)
def test_names_of_a_benchmark(changes):
    with pytest.raises(ValueError, match=next(iter(changes.values()))):
        tab.bench(**{"ops": "linear", "sizes": "tiny", **changes})


def test_rows_escape_what_they_show():
    rows = Rows([{"name": "<b>[red]", "x": 0.12345, "none": None}])
    assert "&lt;b&gt;[red]" in rows._repr_html_() and "<b>[red]" in repr(rows)
    assert "0.123" in repr(rows) and "–" in repr(rows) and repr(Rows()) == ""
    assert " 12.35" in repr(Rows(rows, {"x": "x"}, percent=["x"]))
