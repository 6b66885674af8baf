"""The law of the house: imports run downwards, from a floor to one below it, and never in a circle.

A room is a folder of tab/ or one of the few files that lie in it. Whoever adds a room writes it
here; whoever needs an import that this test refuses has put something on the wrong floor.
"""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from paths import ROOT

FLOORS = (
    ("checks", "drawing", "machine", "ops", "plugins", "statistics"),
    ("files", "kernels", "layers", "run_config"),
    ("bench", "data", "doctor", "models", "tasks", "tracking"),
    ("recipe", "train"),
    ("analysis", "compare", "sweep"),
    ("report", "study"),
    ("cli",),
    # api, a front as cli is, stands above it: what names and places stand for is said in cli once.
    ("__main__", "api"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS, 1) for room in rooms}
FREE = {"__init__", "functional"}  # the public names: they hand on what lies elsewhere


def modules() -> Iterator[tuple[Path, list[str]]]:
    """Each file, and the dotted name of what it defines; kernels/ is imported as tab.kernels."""
    for folder, package in ((ROOT / "tab", ["tab"]), (ROOT / "kernels", ["tab", "kernels"])):
        for path in sorted(folder.rglob("*.py")):
            below = list(path.relative_to(folder).with_suffix("").parts)
            if folder.name == "tab" and below[0] == "kernels":  # a link to the other folder
                continue
            yield path, package + below


def imports(path: Path, name: list[str]) -> Iterator[list[str]]:
    """The dotted names that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = name[: len(name) - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from ([*base, alias.name] for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)


def room(name: list[str]) -> str | None:
    """None: not of this package, or one of its public names."""
    if name[0] != "tab" or len(name) < 2 or name[1] in FREE:
        return None
    return name[1] if name[1] in FLOOR else None


def test_every_file_lies_in_a_room():
    for path, name in modules():
        assert name[1] in FLOOR or name[1] in FREE, f"{path}: put it into a room of test_floors.py"


def arrows() -> Iterator[tuple[Path, str, str, list[str]]]:
    """(file, its room, another room, what of it the file imports)."""
    for path, name in modules():
        for target in imports(path, name) if room(name) else ():
            if room(target) not in (None, room(name)):
                yield path, room(name), room(target), target


def test_imports_run_downwards():
    upwards = [
        f"{path.relative_to(ROOT)} ({mine}, floor {FLOOR[mine]}) imports "
        f"{'.'.join(target)} (floor {FLOOR[other]})"
        for path, mine, other, target in arrows()
        if FLOOR[other] >= FLOOR[mine]
    ]
    assert not upwards, "\n".join(upwards)


def test_the_house_can_be_overlooked():
    """An arrow is a room that imports another, by however many files. Who needs one more looks for
    one that is a detour, or for what lies in the wrong room."""
    assert len(FLOORS) <= 8 and len(FLOOR) <= 26
    assert len({(mine, other) for _, mine, other, _ in arrows()}) <= 100


def test_no_circle_within_a_room():
    """Of imports at the top of a file; graphlib raises CycleError with the circle."""
    known = {".".join(name).removesuffix(".__init__"): path for path, name in modules()}
    graph = {}
    for path, name in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        here = ".".join(name).removesuffix(".__init__")
        graph[here] = set()
        for node in tree.body:
            if not isinstance(node, ast.ImportFrom):
                continue
            base = name[: len(name) - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                target = ".".join([*base, alias.name])
                target = target if target in known else ".".join(base)
                if target in known and target != here and not here.startswith(f"{target}."):
                    graph[here].add(target)
    TopologicalSorter(graph).prepare()
