"""On a machine with a GPU: builds, tests, benchmarks and trains, in at most 9 minutes.

    bench/gpu.sh OUTDIR

OUTDIR then holds summary.txt, bench.json and all.tgz: the logs, all JSON and the study's results,
packed anew after each step, so that a cut at any moment loses one step at most. The summary is
printed last. A step that fails or hangs costs only itself; what it leaves of its time goes on to
the next. The order is by what a first minute must tell: does anything run, is it right, how fast.

    TAB_DATA   what is trained on (tab compare --data); by default drawn pictures
    WHEELS     a folder of wheels of packages that are missing, installed aside
    DRY=1      the same steps on a CPU, each at its smallest, and with all the time that it takes
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from images_per_second import rates, table

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 520  # seconds; ten more for each that has to be killed
OPS, SIZES = "sparse,mla,linear,gated_linear,performer,local", "cifar,vision,long"  # weakest first
KEPT = (".log", ".json", ".jsonl", ".csv", ".toml", ".md", ".html", ".png", ".txt")
FACTS = "import torch, triton; print(torch.__version__, triton.__version__)"


@dataclass(frozen=True)
class Step:
    name: str
    seconds: float  # at most
    commands: list[list[str]]  # side by side
    reserve: float = 0  # seconds that must be left to the steps after it
    needs: tuple[str, ...] = ()  # modules; without one of them the step is left out, and says so
    variables: tuple[dict[str, str], ...] = field(default=())  # of each command
    # For a later step, as long as this one may last; how they end says nothing.
    beside: list[list[str]] = field(default_factory=list)


def steps(out: Path, *, dry: bool, data: str, assemblers: dict[str, str]) -> list[Step]:
    """What is done. assemblers: name -> ptxas that Triton takes; "" is the one it brings along."""
    python, device, options = sys.executable, "cpu" if dry else "cuda", str.split
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests"]
    smoke = [python, "bench/gpu_smoke.py", device]
    named = [
        {"SMOKE": name, "TRITON_CACHE_DIR": str(out / "work" / name)}
        | ({"TRITON_PTXAS_PATH": path} if path else {})
        | ({"DISABLE_MMA_V3": "1"} if name == "no wgmma" else {})
        for name, path in assemblers.items()
    ]
    bench, warm = [python, "-m", "tab", "bench", "--device", device], []
    times = [python, "bench/gpu_times.py", device, str(out / "times.json")]
    study = [python, "-m", "tab", "compare", "--device", device, "--data", data]
    study += ["--out", str(out / "work" / "study")]
    if dry:
        tests = [*pytest[:-1], "tests/train", "--collect-only"]
        bench += options("--ops linear --sizes tiny --contestants none")
        bench += options("--budget 0.01 --processes 1")
        times += options("--ops linear --sizes tiny")
        study += options("--recipe quick --models mlp --attentions none,linear --epochs 1")
        study += options("--set data.validation=20")
    else:
        tests = [*pytest, "-n", str(max(1, (os.cpu_count() or 2) - 2)), "--dist", "worksteal"]
        bench += options("--dtype bfloat16 --causal both --processes 1")
        warm = [  # what is compiled for each contestant is found again by the bench: minutes
            ["nice", *bench, *options(f"--ops {op} --sizes {size} --budget 0")]
            for size in SIZES.split(",")
            for op in OPS.split(",")
        ]
        bench += options(f"--ops {OPS} --sizes {SIZES} --budget 0.2")
        study += options("--recipe fair --epochs 2")
    bench += ["--out", str(out / "bench.json")]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    checked = [sanitizer, "--error-exitcode", "9", *pytest[:-1], "-x", "tests/cuda/test_ops.py"]
    build = [python, "setup.py", "build_ext", "--inplace"]
    found = [
        Step("machine", 15, [["nvidia-smi"], [python, "-c", FACTS]][dry:]),
        Step("build", 150, [] if dry or carried() else [build], 300),
        Step("smoke", 60, [smoke] * len(named), 240, ("triton",), tuple(named)),
        Step("tests", 150, [tests], 200, ("pytest", "hypothesis", "expecttest", "xdist"),
             beside=warm),
        Step("times", 40, [times], 160, ("triton",)),
        Step("bench", 170, [bench], 90, ("triton",)),
        Step("study", 100, [study], 45, ("typer", "rich", "matplotlib", "torchvision", "scipy")),
        # Without the caching allocator each tensor has bounds of its own.
        Step("sanitizer", 45, [] if dry else [[*checked, "-k", "33-64-dtype0"]],
             needs=("pytest", "hypothesis"), variables=({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},)),
    ]  # fmt: skip
    return [replace(step, seconds=math.inf) for step in found] if dry else found


def carried() -> bool:
    """Whether the extensions lie here and load: then nothing is built."""
    load = "import tab.ops, tab._host; from tab.ops import _op; import tab._C, tab._C_cuda"
    return (
        subprocess.run([sys.executable, "-c", load], cwd=ROOT, capture_output=True).returncode == 0
    )


def found_assemblers() -> dict[str, str]:
    """Triton's own ptxas, the one that it brings for Blackwell (since 3.8 newer), that of the
    toolkit, the one of a wheel, and no wgmma as a yardstick."""
    found = {"bundled": "", "no wgmma": ""}
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        newer = Path(triton.origin).parent / "backends/nvidia/bin/ptxas-blackwell"
        found |= {"blackwell": str(newer)} if newer.exists() else {}
    if Path("/usr/local/cuda/bin/ptxas").exists():
        found["toolkit"] = "/usr/local/cuda/bin/ptxas"
    for place in map(Path, sys.path):
        for path in sorted(place.glob("nvidia/*/bin/ptxas")):
            found.setdefault("wheel", str(path))
    return found


def missing(modules: Iterable[str]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def executed(step: Step, seconds: float, log: Path) -> str:
    """Runs a step's commands side by side into `log` -> "ok", or what went wrong."""
    end, running = time.monotonic() + seconds, []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with log.open("wb") as file, contextlib.ExitStack() as stack:
        for command in step.beside:
            with contextlib.suppress(OSError):
                process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **quiet)
                stack.callback(_stopped, process, end)
        for i, command in enumerate(step.commands):
            more = step.variables[i] if step.variables else {}
            try:
                running.append(subprocess.Popen(
                    command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True,
                    env={**os.environ, **more},
                ))  # fmt: skip
            except OSError as error:
                file.write(f"{error}\n".encode())
                return f"FAILED ({error.strerror}: {command[0]})"
        said = [_ended(process, end) for process in running]
    return next((text for text in said if text != "ok"), "ok")


def _stopped(process: subprocess.Popen, end: float) -> None:
    """Waits until `end`, and kills what still runs then."""
    try:
        process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ended(process: subprocess.Popen, end: float) -> str:
    """Waits until `end`, interrupts what still runs then, and kills it ten seconds later."""
    cut = False
    for grace, sign in ((end - time.monotonic(), signal.SIGINT), (10.0, signal.SIGKILL)):
        try:
            process.wait(max(0.0, grace))
            break
        except subprocess.TimeoutExpired:
            cut = True
            os.killpg(process.pid, sign)
    code = process.wait()
    return "CUT, out of time" if cut else f"FAILED ({code})" if code else "ok"


def perform(
    todo: list[Step],
    out: Path,
    *,
    run: Callable[[Step, float, Path], str] = executed,
    clock: Callable[[], float] = time.monotonic,
    total: float = TOTAL,
) -> list[tuple[str, str, float]]:
    """Each step in turn, within its share of `total`; the files are packed after each.
    -> (name, what became of it, seconds)"""
    start, told = clock(), []
    for step in todo:
        left = total - (clock() - start) - step.reserve
        began, lacking = clock(), missing(step.needs)
        if lacking:
            what = f"left out: no {', '.join(lacking)} here; WHEELS=FOLDER names wheels"
        elif not step.commands:
            what = "nothing to do"
        elif left < 1:
            what = "left out: no time left"
        else:
            what = run(step, min(step.seconds, left), out / "work" / f"{step.name}.log")
        told.append((step.name, what, clock() - began))
        (out / "summary.txt").write_text(summary(told, out), encoding="utf-8")
        pack(out)
    return told


def summary(told: list[tuple[str, str, float]], out: Path) -> str:
    """A paragraph a step: what became of it, and what its log says that a reader must see."""
    marks = ("FAILED", "ERROR", "E  ", "error:", "smoke ", "Error")
    lines = []
    for name, what, seconds in told:
        lines.append(f"{name}: {what}, {seconds:.0f} s")
        log = out / "work" / f"{name}.log"
        text = log.read_text(errors="replace").splitlines() if log.exists() else []
        lines += [x[:160] for x in text if x.startswith(marks) or " passed" in x][-24:]
        if name == "study" and (out / "work/study/experiment_results.csv").exists():
            lines.append(table(rates(out / "work/study")))
    return "\n".join(lines) + "\n"


def pack(out: Path) -> None:
    """out/all.tgz, whole at every moment; weights and caches stay."""
    partial = out / "all.part"
    with tarfile.open(partial, "w:gz") as tar:
        for path in sorted([*out.glob("*"), *out.glob("work/*.log"), *out.glob("work/study/**/*")]):
            if path.is_file() and path.suffix in KEPT:
                tar.add(path, path.relative_to(out))
    partial.replace(out / "all.tgz")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: bench/gpu.sh OUTDIR", file=sys.stderr)
        return 2
    dry, out = bool(os.environ.get("DRY")), Path(arguments[0]).resolve()
    (out / "work").mkdir(parents=True, exist_ok=True)
    data = os.environ.get("TAB_DATA") or ("shapes:200/40" if dry else "shapes:20000/2000")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(out / "work" / "site")])
    os.environ.setdefault("TAB_CUDA", "0" if dry else "1")
    if wheels := os.environ.get("WHEELS"):
        site = str(out / "work" / "site")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*command, "--target", site, *map(str, Path(wheels).glob("*.whl"))])
        sys.path.append(site)
    link = ROOT / "tab" / "kernels"  # kernels/ is tab.kernels, which an install would know
    linked = not link.exists() and importlib.util.find_spec("tab.kernels") is None
    if linked:
        link.symlink_to("../kernels")
    if not dry and (arch := capability()):
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", arch)
    try:
        todo = steps(out, dry=dry, data=data, assemblers={"dry": ""} if dry else found_assemblers())
        told = perform(todo, out, total=math.inf if dry else TOTAL)
    finally:
        if linked:
            link.unlink()
    print((out / "summary.txt").read_text(encoding="utf-8"), end="")
    bad = [name for name, what, _ in told if what not in ("ok", "nothing to do")]
    print(json.dumps({"failed": bad, "seconds": round(sum(s for *_, s in told))}))
    return 1 if bad else 0


def capability() -> str:
    """Of the GPU here, as TORCH_CUDA_ARCH_LIST wants it: this build is not to be shipped."""
    ask = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    if done.returncode:
        print("no GPU: torch cannot name one", file=sys.stderr)
        raise SystemExit(1)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
