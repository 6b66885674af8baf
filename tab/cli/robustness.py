"""`tab robustness`: how trained models fare on worse images."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .given import before_work, device_of, load_data, use_threads
from .terminal import bar, or_resume, pairs, say

HIDDEN = ("settings", "right")  # the latter: each image's answer


def command(
    run: Annotated[Path, typer.Argument(help="Directory of a run or of a comparison.")],
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
) -> None:
    """Measure trained models under noise, corruptions and attacks, and their calibration."""
    before_work()
    from ..analysis.robustness import Options, measure
    from ..compare.runs import trained_runs
    from ..run_config import RunConfig
    from ..train.run_files import read_run_file

    use_threads(threads)
    runs, spec = trained_runs(run)
    if data is None and spec.startswith("folder:"):
        raise ValueError(f"{run} was trained on {spec}: give that folder or archive as --data")
    images_of = RunConfig.from_dict(read_run_file(runs[0])["config"]).data
    dataset = load_data(data or spec, images_of, kept=not data)
    chosen, where = Options(images, cifar10c, cifar101, autoattack), shlex.quote(str(run))
    again = f"tab robustness {where} (with the same options)"
    for path in runs:
        with bar("robustness") as show, or_resume(again):
            found = measure(path, dataset, chosen, device=device_of(device), progress=show)
        rows = [
            (name, ", ".join(f"{k} {_short(x)}" for k, x in section.items() if k not in HIDDEN))
            for name, section in found.items()
        ]
        pairs(path.name, rows)
    if (run / "config.toml").is_file():
        say(f"To have these figures in the report: tab report {where}")


def _short(value) -> str:
    """Numbers to four digits, in lists too."""
    if isinstance(value, list):
        return " ".join(map(_short, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
