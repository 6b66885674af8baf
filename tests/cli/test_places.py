"""Places where nothing can be written, and commands that are stopped early: each says in a line
what is wrong and how to go on, and leaves what was there."""

import errno
import importlib.util
import os
import shlex
import signal

import pytest
from small_cli import SMALL, tab

from tab import files
from tab.bench.results import save
from tab.bench.rows import Row
from tab.cli import check, report, terminal, train
from tab.drawing.figures import Picture
from tab.machine import told

pytestmark = pytest.mark.usefixtures("one_thread")
BENCH = [
    "bench",
    "--ops",
    "linear",
    "--sizes",
    "tiny",
    "--contestants",
    "eager",
    "--budget",
    "0.01",
    "--processes",
    "1",
    "--out",
]
NONE = ("--models", "mlp", "--attentions", "none", *SMALL)


@pytest.fixture
def steps(tmp_path):
    row = Row("steps/vit/n16/study/b4", "none", batch=4, tokens=16)
    row.timed("step", [1.0] * 3, [])
    save(tmp_path / "steps.json", [row], None, {}, "tab bench steps")
    return tmp_path / "steps.json"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_where_a_directory_should_be(place, steps, tmp_path):
    (tmp_path / "file").write_text("kept")
    commands = [("train", "mlp", "none", *SMALL), ("compare", *NONE)]
    commands.append(("lengths", "--steps", steps))
    sweep = [word for word in NONE if word not in ("--epochs", "1")]
    sweep += ["--configurations", "1", "--epochs", "1", "--images", "0", "--validation", "20"]
    if importlib.util.find_spec("optuna"):
        commands.append(("sweep", *sweep))
    for words in commands:
        said = tab(*words, "--out", tmp_path / place)
        assert said.exit_code == 2, said.output
        (line,) = (line for line in said.stderr.splitlines() if "busy" not in line)
        assert line.startswith(f"error: {tmp_path / place}: cannot make this directory: ")
        assert "give another name" in line and "Errno" not in line and "go on with" not in line
    assert (tmp_path / "file").read_text() == "kept"


def test_results_of_bench_replace_nothing_but_a_file(tmp_path, monkeypatch):
    """Renamed over a device, they would take its place."""
    os.mkfifo(tmp_path / "pipe")
    said = tab(*BENCH, tmp_path / "pipe")
    assert said.exit_code == 2 and "pipe is no file: give another place" in said.stderr
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    said = tab(*BENCH, tmp_path / "new.json")
    assert said.exit_code == 2 and f"nothing can be written in {tmp_path}" in said.stderr


def refuse(*args, **options):
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(
    "error, text",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "a"), "a: Read-only file system; make"),
        (OSError(errno.ENOENT, "none (do that)", "a"), "a: none (do that)"),  # says so itself
        (OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)), "Connection refused"),
        (OSError("words"), "words"),
    ],
)
def test_what_the_system_says_comes_with_what_to_do(error, text):
    assert told(error).startswith(text) and "Errno" not in told(error)


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / f"a.{os.getpid()}.tmp.png").symlink_to("/dev/full")
    (tmp_path / "a.png").write_text("before")
    with pytest.raises(OSError, match=r"cannot write: No space left on device: '.*a\.png'"):
        Picture(figsize=(1, 1)).keep(tmp_path / "a.png")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_two_processes_may_write_one_file_at_once(tmp_path, monkeypatch):
    """Two reports: the second begins and ends while the first is not done."""
    place, number, sync = tmp_path / "a", os.getpid(), os.fsync

    def other(descriptor: int) -> None:
        sync(descriptor)
        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(os, "getpid", lambda: number + 1)
        files.write(place, b"theirs")

    monkeypatch.setattr(os, "fsync", other)
    files.write(place, b"ours")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["ours"]
    draw = Picture.savefig

    def drawn(self, path, **options) -> None:
        draw(self, path, **options)
        monkeypatch.setattr(os, "getpid", lambda: number)
        monkeypatch.setattr(Picture, "savefig", draw)
        self.keep(place.with_suffix(".png"))

    monkeypatch.setattr(Picture, "savefig", drawn)
    Picture(figsize=(1, 1)).keep(place.with_suffix(".png"))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "a.png"}


def test_control_c_while_a_file_is_written_leaves_nothing_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", stop)
    (tmp_path / "a").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "a", b"after")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("file, what", files.HOLDS.items())
def test_a_directory_holds_one_study_alone(file, what, tmp_path):
    """`tab robustness`, for one, would take a comparison with a run.json for that run."""
    (tmp_path / file).write_text("kept")
    commands = [("train", "mlp", "none", *SMALL)] if file != "run.json" else []
    for words in (*commands, ("compare", *NONE)):
        said = tab(*words, "--out", tmp_path)
        assert said.exit_code == 2 and f"{tmp_path} already holds {what}: resume" in said.stderr
    assert (tmp_path / file).read_text() == "kept"


# --- stopped early --------------------------------------------------------------------------------


def stop(*args, **options):
    raise KeyboardInterrupt


def last(said) -> str:
    """The last line of a command that was stopped."""
    assert said.exit_code == 130, said.output
    return said.stderr.splitlines()[-1]


def test_a_run_stopped_before_it_began_goes_on(tmp_path, monkeypatch):
    """While its time is estimated, there is nothing yet that --resume could continue."""
    with monkeypatch.context() as patched:
        patched.setattr(train, "say_time", stop)
        line = last(tab("train", "mlp", "none", *SMALL, "--out", tmp_path / "run"))
    how = line.removeprefix("stopped; go on with: tab ")
    assert how.startswith("train mlp none ") and "--resume" not in how
    assert tab(*shlex.split(how)).exit_code == 0


def test_a_comparison_stopped_before_its_first_run_says_how_to_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "say_same", stop)
    line = last(tab("compare", *NONE, "--out", tmp_path / "out"))
    assert line == f"stopped; go on with: tab compare --resume {tmp_path / 'out'}"


def test_any_other_command_begins_again(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "use_plugins", stop)
    monkeypatch.setattr("tab.compare.plan.plugins_of", lambda folder: [])
    assert last(tab("report", tmp_path)) == "stopped; the same command begins again"


def test_a_second_control_c_takes_no_words_away(tmp_path, monkeypatch):
    """It comes while the last line is printed; afterwards Control-C is what it was."""
    before, say = signal.getsignal(signal.SIGINT), terminal.say

    def press(*args, **options):
        signal.raise_signal(signal.SIGINT)

    def interrupted(*args, **options):
        press()
        say(*args, **options)

    monkeypatch.setattr(report, "use_plugins", press)
    monkeypatch.setattr("tab.compare.plan.plugins_of", lambda folder: [])
    monkeypatch.setattr(terminal, "say", interrupted)
    assert last(tab("report", tmp_path)) == "stopped; the same command begins again"
    assert signal.getsignal(signal.SIGINT) is before


def test_control_c_while_the_commands_load_prints_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr("tab.cli.main.main", stop)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("tab.__main__").main()
    assert ended.value.code == 130 and capsys.readouterr().err == ""
