"""The sweep in a PostgreSQL database of its own: the same winners, one driver, kills."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from patience import PATIENCE

optuna = pytest.importorskip("optuna")

from kill_sweep import DATA, result  # noqa: E402
from small_sweep import Count, begin, kills, tab_sweep, whole  # noqa: E402

from tab.data.load import load_dataset  # noqa: E402
from tab.sweep.driver import records, sweep  # noqa: E402
from tab.sweep.plan import SweepPlan, name_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset():
    return load_dataset(DATA)


@pytest.fixture(scope="module")
def done(tmp_path_factory, dataset):
    return whole(tmp_path_factory.mktemp("done"), dataset)


def _server() -> Path | None:
    found = [shutil.which("initdb"), *Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return next((Path(path).parent for path in found if path), None)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """The address of a PostgreSQL server of our own, in a folder: a port could be another's."""
    pytest.importorskip("psycopg")
    if not (programs := _server()):
        pytest.skip("no PostgreSQL server here: initdb was not found")
    import tempfile

    with tempfile.TemporaryDirectory(prefix="pg") as place:
        run = {"check": True, "capture_output": True, "timeout": PATIENCE}
        if os.geteuid() == 0:  # a server refuses to run as root
            shutil.chown(place, "postgres", "postgres")
            run |= {"user": "postgres", "group": "postgres"}
        data = f"{place}/data"
        subprocess.run([programs / "initdb", "-D", data, "-U", "tab", "-A", "trust"], **run)
        options = f"-c listen_addresses= -c fsync=off -c unix_socket_directories={place}"
        server = [programs / "pg_ctl", "-D", data, "-l", f"{place}/log", "-w", "-t", str(PATIENCE)]
        subprocess.run([*server, "-o", options, "start"], **run)
        try:
            yield f"postgresql://tab@/postgres?host={place}"
        finally:
            subprocess.run([*server, "-m", "immediate", "stop"], **run)


def test_postgresql_holds_the_same_sweep(database, done, dataset, tmp_path):
    out = begin(tmp_path, dataset, storage=database)
    it, watcher = SweepPlan.load(out), Count()

    class Stop(Count):
        def end(self, pair, ended):
            super().end(pair, ended)
            if len(self.ended) == 7:
                raise KeyboardInterrupt

    stopped = Stop()
    with pytest.raises(KeyboardInterrupt):
        sweep(it, dataset, out, watcher=stopped)
    sweep(it, dataset, out, watcher=watcher)
    assert result(out) == result(done[0])
    assert stopped.epochs + watcher.epochs == 2 * (5 + 2 + 2)
    assert not (out / "study.journal").exists()
    assert tab_sweep("show", out).exit_code == 0
    address = database.replace("postgresql", "postgresql+psycopg")
    study = optuna.load_study(study_name=f"{name_of(out)}/mlp-self", storage=address)
    assert study.best_trial.user_attrs["rung"] == 2


def test_postgresql_after_a_kill(database, tmp_path):
    """The server notices that the driver is gone, and lets the next one in."""
    found = kills(1, tmp_path, storage=database)
    assert re.fullmatch(r"\(1, \d+, \[\]\)", found), found


def test_postgresql_has_one_driver(database, dataset, tmp_path):
    """Also from a copy of the directory, on another machine perhaps."""
    out = begin(tmp_path / "a", dataset, storage=database)
    copy = shutil.copytree(out, tmp_path / "b" / "sweep")
    with (
        records(SweepPlan.load(out), out, mine=True),
        pytest.raises(ValueError, match="another driver"),
    ):
        sweep(SweepPlan.load(copy), dataset, copy)


def test_a_database_that_is_not_there(dataset, tmp_path):
    out = begin(tmp_path, dataset, storage=f"postgresql://tab:secret@/x?host={tmp_path}")
    assert "secret" not in (out / "sweep.toml").read_text()
    with pytest.raises(ValueError, match="no database at postgresql://tab@"):
        sweep(SweepPlan.load(out), dataset, out)
