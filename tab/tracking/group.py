"""The watchers that --watch names, told together; none of them can end a run.

A file of tab/tracking/watchers/ is named as its watcher is and ends with `watcher = …`. A package
of your own declares its class as an entry point:

    [project.entry-points."tab.watchers"]
    mine = "my_package.watch:Mine"
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from ..checks import check_keys
from ..run_config import RunConfig
from . import watchers as folder
from .watcher import RunWatcher, WatchedRun


def names() -> list[str]:
    """The watchers of TAB, then those of installed packages, each in alphabetical order."""
    return [*_own(), *sorted({point.name for point in _entry_points()} - set(_own()))]


def check(given: Sequence[str]) -> dict[str, type[RunWatcher]]:
    """The classes of these names; an exception if one is unknown, or says that it cannot work."""
    check_keys("--watch", given, names())
    found = {name: _load(name) for name in given}
    for name, kind in found.items():
        try:
            kind.check()
        except ImportError as error:
            way_out = f': pip install "transformer-attention-bench[{kind.extra}]"'
            text = f"--watch {name} needs what is not installed ({error})"
            raise ImportError(text + way_out * bool(kind.extra)) from error
    return found


def _load(name: str) -> type[RunWatcher]:
    if name in _own():
        return importlib.import_module(f"{folder.__name__}.{name}").watcher
    found = next(point for point in _entry_points() if point.name == name).load()
    if not (inspect.isclass(found) and issubclass(found, RunWatcher)):
        raise TypeError(f"the watcher {name} is no tab.tracking.RunWatcher: {found!r}")
    return found


def _own() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(folder.__path__)]


def _entry_points():
    return entry_points(group="tab.watchers")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


class Watchers:
    """Tells several watchers of the runs in `out`; use it as a context. Each may write to
    out/<name>.

    One that raises is left alone from then on, and `say` is told why, in one line. At the end the
    runs that are still open count as stopped.
    """

    def __init__(
        self,
        kinds: dict[str, type[RunWatcher]],
        out: Path,
        study: str = "",
        *,
        say: Callable[[str], None] = _warn,
    ):
        study = study or out.resolve().name
        self.watchers = {name: kind(out / name, study) for name, kind in kinds.items()}
        self.say, self.open = say, dict[str, WatchedRun]()

    def __enter__(self) -> Watchers:
        return self

    def __exit__(self, *_) -> None:
        for name in list(self.open):
            self.end(name, "stopped", {})
        self._each(lambda watcher: watcher.close())

    @property
    def hints(self) -> list[str]:
        """How to look at what they write."""
        return [hint for watcher in self.watchers.values() if (hint := watcher.hint)]

    def epoch(self, name: str, config: RunConfig, row: dict) -> None:
        """After an epoch; a run begins by its first one here."""
        run = self._begun(name, config)
        self._each(lambda watcher: watcher.epoch(run, dict(row)))

    def end(
        self, name: str, status: str, summary: dict, *, config: RunConfig | None = None
    ) -> None:
        """A run ended. One without an epoch here had ended before, and is not told of, unless its
        config is given: it failed too early."""
        if config:
            self._begun(name, config)
        if run := self.open.pop(name, None):
            self._each(lambda watcher: watcher.end(run, status, dict(summary)))

    def _begun(self, name: str, config: RunConfig) -> WatchedRun:
        if name not in self.open:
            run = self.open[name] = WatchedRun(name, config)
            self._each(lambda watcher: watcher.begin(run))
        return self.open[name]

    def _each(self, call: Callable[[RunWatcher], None]) -> None:
        for name, watcher in list(self.watchers.items()):
            try:
                call(watcher)
            except Exception as error:
                del self.watchers[name]
                what = " ".join(str(error).split()) or "no reason given"
                text = f"--watch {name} stopped ({type(error).__name__}: {what}); the runs go on"
                self.say(f"{text} without it")
                with contextlib.suppress(Exception):  # that it failed has been said
                    watcher.close()
