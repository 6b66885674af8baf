"""What the shared options come to in a terminal: the recipe, the data with a bar, how threads wait,
the programs that runs are logged to."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from .. import machine
from .terminal import bar, errors, say

# Turns of libgomp's waiting loop, of which its own default is 300,000. Beside one, two and four
# other processes on two cores a training step took 1.8, 2.2 and 3.2 times its quiet time, with the
# default 2.7, 3.5 and 5.5; on a quiet machine it cost nothing (0.99, median of five pairs).
SPINS = "4000"


def read_recipe(
    name: str,
    epochs: int | None = None,
    overrides: list[str] | None = None,
    *,
    compiled: bool = False,
):
    from ..recipe.recipe import load_recipe, parse_override

    changes = dict(map(parse_override, overrides or []))
    short = {"train.epochs": ("--epochs", epochs), "train.compile": ("--compile", compiled or None)}
    for key, (option, value) in short.items():
        if value is None:
            continue
        if changes.setdefault(key, value) != value:
            raise ValueError(f"{option} and --set {key}={changes[key]} disagree: give one")
    return load_recipe(name, changes)


def load_data(spec: str, images=None, *, kept: bool = False):
    """`tab.study.given.load_data`, with a bar."""
    from ..study import given

    with bar("data") as show:
        return given.load_data(spec, images, kept=kept, progress=show)


def before_work(*, trains: bool = True) -> None:
    """To be called before torch is imported. The threads of a training wait for one another in a
    short spin and then asleep, unless the environment says otherwise: on a machine where something
    else runs, threads that spin on hold up the very one that they wait for. A busy machine is told
    of."""
    if trains and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    load, count = machine.load(), machine.cores()
    if load is not None and load > count:
        text = f"The machine is busy (load {load:.1f} on {count} cores): times will mean little."
        say(text, style="yellow", to=errors)


def use_threads(threads: int | None) -> None:
    """In this process; None leaves torch's own choice."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def watchers(kinds: dict[str, type], out: Path, study: str = ""):
    """`tab.study.watching.watchers`, after a line on how to look at what they write."""
    from ..study import watching

    failed = functools.partial(say, style="yellow", to=errors)
    return watching.watchers(kinds, out, study, failed=failed, hint=say)
