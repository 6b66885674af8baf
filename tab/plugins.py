"""Plugins: an attention of one's own in a file or a module, without a package around it.

    tab compare --plugin mine.py --attentions none,mine

A plugin is run once in a process; what it registers (`tab.layers.register_attention`) is known from
then on. A study keeps the name and the checksum of each, so that what was trained with one formula
does not go on with another. A file travels with the tasks: other processes and other machines need
not have it; a module has to be installed where a task runs.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import linecache
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Plugin:
    """name: the full path of a file, or a module's. sha256: of the file, or of all .py files of the
    module. source: of a file."""

    name: str
    sha256: str
    source: str | None = None

    @property
    def module(self) -> str:
        """As Python knows it; of a file a name that no other module has, but for what that file
        held before."""
        if self.source is None:
            return self.name
        place = hashlib.sha256(self.name.encode("utf-8", "surrogateescape")).hexdigest()
        return f"tab_plugin_{Path(self.name).stem}_{place[:8]}"

    def record(self) -> dict[str, str]:
        """What a study keeps of it."""
        return {"name": self.name, "sha256": self.sha256}


_loaded: dict[str, Plugin] = {}  # by checksum


def loaded() -> tuple[Plugin, ...]:
    """Those that run in this process."""
    return tuple(_loaded.values())


def origin(of: type) -> dict[str, str] | None:
    """The record of the plugin that a class comes from; None if it comes from none."""
    for plugin in _loaded.values():
        if of.__module__ == plugin.module or of.__module__.startswith(f"{plugin.module}."):
            return plugin.record()
    return None


def find(name: str) -> Plugin:
    """The plugin called so, a .py file or a module; it is read and not run. A ValueError: there is
    none."""
    if name.endswith(".py") or "/" in name or "\\" in name:
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"there is no plugin file {path}")
        data = path.read_bytes()
        source = data.decode("utf-8-sig")
        return Plugin(str(path.resolve()), hashlib.sha256(data).hexdigest(), source)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise ValueError(
            f"there is no plugin module {name}: install it, or give a file, such as {name}.py"
        )
    folders = spec.submodule_search_locations or ()
    files = sorted(path for folder in folders for path in Path(folder).rglob("*.py"))
    sums = hashlib.sha256()
    for file in files or [Path(spec.origin)]:
        sums.update(file.read_bytes())
    return Plugin(name, sums.hexdigest())


def load(plugins: Iterable[Plugin]) -> None:
    """Runs those that do not run in this process yet, in place of what they were before; a
    ValueError names one that fails."""
    for plugin in plugins:
        if plugin.sha256 in _loaded:
            continue
        _forget([was for was in _loaded.values() if was.module == plugin.module])
        try:
            if plugin.source is None:
                _import(plugin)
            else:
                _run(plugin)
        except Exception as error:  # a plugin may fail in any way
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"the plugin {plugin.name} does not load: {why}") from error
        _loaded[plugin.sha256] = plugin


def _forget(before: Iterable[Plugin]) -> None:
    """So that Python does not take an earlier state of a module for the one that is there now."""
    for plugin in before:
        del _loaded[plugin.sha256]
        for name in [*sys.modules]:
            if name == plugin.module or name.startswith(f"{plugin.module}."):
                del sys.modules[name]
    importlib.invalidate_caches()


def _import(plugin: Plugin) -> None:
    """It is the module of this machine, and has to be the very same."""
    if (here := find(plugin.name)).sha256 != plugin.sha256:
        raise ValueError(f"here it is another one (sha256 {here.sha256[:12]}…)")
    importlib.import_module(plugin.name)


def _run(plugin: Plugin) -> None:
    """From its source, which the disk of this machine need not hold."""
    module = types.ModuleType(plugin.module)
    module.__file__ = plugin.name
    lines = plugin.source.splitlines(keepends=True)
    # For tracebacks, and for compilers that read the source of a function.
    linecache.cache[plugin.name] = (len(plugin.source), None, lines, plugin.name)
    sys.modules[plugin.module] = module
    try:
        exec(compile(plugin.source, plugin.name, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[plugin.module]
        raise


def again(
    kept: Sequence[dict[str, str]],
    given: Sequence[str] = (),
    results: Callable[[str], Sequence[str]] | None = None,
) -> list[Plugin]:
    """The plugins of a study that goes on. kept: their records. given: where they are now, as far
    as that is said. results: the paths of what it holds that a checksum's plugin made; one without
    any may have changed. A ValueError names a plugin that is gone, is another one, or came later.
    """
    here = list(map(find, given))
    found = [_same(record, here) or _successor(record, here, results) for record in kept]
    if extra := [plugin.name for plugin in here if plugin not in found]:
        were = ", ".join(f"{k['name']} (sha256 {k['sha256'][:12]}…)" for k in kept) or "none"
        raise ValueError(
            f"{', '.join(extra)} is none of the plugins that this was begun with: {were}; give "
            "these as they were, or start anew"
        )
    return found


def _same(kept: dict[str, str], here: Sequence[Plugin]) -> Plugin | None:
    return next((plugin for plugin in here if plugin.sha256 == kept["sha256"]), None)


def _successor(
    kept: dict[str, str],
    here: Sequence[Plugin],
    results: Callable[[str], Sequence[str]] | None,
) -> Plugin:
    """What now has the name of a plugin."""
    name = Path(kept["name"]).name
    try:
        found = next((p for p in here if Path(p.name).name == name), None) or find(kept["name"])
    except ValueError as error:
        raise ValueError(
            f"{error}, which this was begun with: put it back, or say with --plugin where it is now"
        ) from None
    if found.sha256 == kept["sha256"] or (results and not results(kept["sha256"])):
        return found
    changed = (
        f"the plugin {found.name} has changed since this was begun (sha256 was "
        f"{kept['sha256'][:12]}…, is {found.sha256[:12]}…): put back what it was, or "
    )
    if not results:
        raise ValueError(f"{changed}start anew")
    made = results(kept["sha256"])
    more = f" and {len(made) - 3} more" if len(made) > 3 else ""
    raise ValueError(
        f"{changed}remove what was trained with that, and it is trained anew: "
        f"{', '.join(made[:3])}{more}"
    )
