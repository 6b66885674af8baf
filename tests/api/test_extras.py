"""Without the extras every public name is still there; what needs one says so when it is called."""

import pytest
from forks import python
from small_grid import GRID, begin, resume

from tab.data.load import load_dataset

EXTRAS = (
    *("optuna", "sklearn", "psycopg", "ray", "submitit", "tensorboard", "wandb", "mlflow"),
    *("datasets", "pyautoattack", "timm", "pandas", "sqlalchemy", "alembic"),
)
HIDDEN = f"""
import sys
for name in {EXTRAS!r}:
    sys.modules[name] = None  # as if it were not installed
import tab
"""


def without(program: str, *args: str, folder=None) -> str:
    """What a program prints where no extra is installed."""
    done = python("-W", "ignore", "-c", HIDDEN + program, *args, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_name_can_be_asked_for_and_looked_at():
    program = """
import inspect
for name in sorted({*dir(tab), *tab.__all__}):
    assert hasattr(tab, name), name
    value = getattr(tab, name)
    hasattr(value, "__wrapped__"), inspect.unwrap(value) if callable(value) else None
    if name in tab.__all__ and callable(value):
        inspect.signature(value), inspect.getdoc(value)
assert not hasattr(tab, "nothing_of_this_name")
dir(tab.sweep), dir(tab.compare), repr(tab.sweep), hasattr(tab.sweep, "nothing")
print(*inspect.signature(tab.sweep).parameters)
"""
    assert without(program).split()[:2] == ["attentions", "models"]


def test_what_needs_no_extra_does_without(tmp_path):
    program = """
found = tab.compare("none,linear", "mlp", recipe="quick", data="shapes:200/40", epochs=1, tell=None,
                    overrides={"data.images": 100, "data.validation": 20}, out="out")
# Nor was torch's compiler loaded, which takes as long as torch itself.
assert not {"torch._dynamo", "torch._inductor", "sympy"} & {*sys.modules}
print(len(found.summary), len(tab.load_study("out").resume(tell=None).runs))
assert "<table>" in found._repr_html_() and found.plot()
try:
    tab.sweep("self", "mlp", recipe="quick", space="tuning", data="shapes:200/40", tell=None)
except ImportError as error:
    print(error)
try:
    tab.compare("self", "mlp", recipe="quick", data="shapes:200/40", tune=2, out="tuned", tell=None)
except ImportError as error:
    print(error)
"""
    lines = without(program, folder=tmp_path).splitlines()
    assert lines[0] == "2 2"
    assert lines[1] == lines[2] and lines[1].endswith('[sweep]"') and len(lines) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing was begun in vain


@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_the_shell_says_it_before_it_begins(command, tmp_path):
    program = "sys.argv = ['tab', *sys.argv[1:]]\nimport tab.cli.main\ntab.cli.main.main()\n"
    more = ["--tune", "2"] if command == "compare" else ["--space", "tuning"]
    given = [command, "--models", "mlp", "--attentions", "self", "--data", "shapes:200/40", *more]
    done = python("-W", "ignore", "-c", HIDDEN + program, *given, folder=tmp_path)
    assert done.returncode == 2 and "transformer-attention-bench[sweep]" in done.stderr
    assert not (tmp_path / "results").exists()


def test_a_comparison_goes_on_without(tmp_path):
    dataset = load_dataset("shapes:100/20")
    out = begin(tmp_path / "out", dataset)
    resume(out, dataset)
    program = "sys.argv = ['tab', 'compare', '--resume', 'out']\nimport tab.cli.main\n"
    said = without(program + "tab.cli.main.main()", folder=tmp_path)
    assert "Self-Attention" in said and GRID.models == ["mlp"]
