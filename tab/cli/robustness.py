"""`tab robustness`: how trained models fare on worse images."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..study.given import device_of, use_plugins
from . import options
from .answer import Answer
from .given import before_work, load_data, use_threads
from .terminal import bar, command_line, next_command, or_resume, say


def command(
    run: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory of a run or of a comparison.")
    ],
    plugin: options.Plugin = None,
    data: options.DataAgain = None,
    images: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Number of test images that are attacked."),
    ] = 1000,
    cifar10c: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with the official .npy files of CIFAR-10-C."),
    ] = None,
    cifar101: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with the official .npy files of CIFAR-10.1."),
    ] = None,
    autoattack: Annotated[
        bool,
        typer.Option(
            "--autoattack",
            help="AutoAttack too, at ε = 1/255 and 8/255; minutes for each run. "
            "Needs the extra `autoattack`.",
        ),
    ] = False,
    device: options.Device = None,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Measure trained models under noise, corruptions and attacks, and their calibration."""
    answer = Answer(quiet=quiet, as_json=as_json)
    before_work()
    from ..analysis.robustness import Options, measure
    from ..compare.plan import plugins_of, results_of
    from ..compare.runs import trained_runs
    from ..train.run_files import read_config
    from .robustness_table import robustness_table, summaries

    use_threads(threads)
    use_plugins(plugin, plugins_of(run), results_of(run))
    runs, spec = trained_runs(run)
    if data is None and spec.startswith("folder:"):
        raise ValueError(f"{run} was trained on {spec}: give that folder or archive as --data")
    dataset = load_data(data or spec, read_config(runs[0]).data, kept=not data)
    chosen, found = Options(images, cifar10c, cifar101, autoattack), {}
    again = f"tab robustness {shlex.quote(str(run))} (with the same options)"
    say(f"{len(runs)} trained models on {dataset.note}")
    with bar("robustness") as show, or_resume(lambda: again):
        for i, path in enumerate(runs):

            def part(done: int, total: int, what: str, i=i) -> None:
                show(i * total + done, len(runs) * total, what)

            where = device_of(device)
            found[path.name] = measure(path, dataset, chosen, device=where, progress=part)
    answer.show(robustness_table(found))
    after = None
    if (run / "config.toml").is_file():
        after = command_line("report", str(run))
        next_command(after)
    answer.end(run=run, rows=summaries(found), next=after)
