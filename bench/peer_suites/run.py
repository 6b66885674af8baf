"""A peer's own test suite on TAB: its kernels are replaced by adapters (on_*.py), its tests, its
naive functions and its tolerances stay. No code of the peer is here: CHECKOUT is a clone of it.

    python bench/peer_suites/run.py fla CHECKOUT [--control] [--out FILE] [-- options of pytest]
    python bench/peer_suites/run.py local-attention CHECKOUT
    python bench/peer_suites/run.py attention-gym CHECKOUT
    python bench/peer_suites/run.py transformers CHECKOUT

TAB and what the peer imports have to be installed, the peer itself has not. Prints a table in
Markdown, a line for each file of tests: how many passed and failed, how many did so without a call
of TAB, and how many ask for what TAB does not have; then the reasons. With --control all run once
more with outputs 5 % too large, and the table says how many of those that passed notice it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
OURS = "TAB: "  # as swap.py has it, which imports pytest


class Suite(NamedTuple):
    adapter: str
    sources: str  # the folder with the package
    tests: tuple[str, ...]


SUITES = {
    "fla": Suite(
        "on_fla",
        ".",
        tuple(f"tests/ops/test_{x}.py" for x in ("linear_attn", "retention", "simple_gla")),
    ),
    "local-attention": Suite("on_local_attention", ".", ("tests",)),
    "attention-gym": Suite(
        "on_attention_gym",
        ".",
        tuple(
            f"test/test_{x}.py"
            for x in (
                "global_sliding_window",
                "document_mask",
                "causal_block_mask",
                "block_diffusion",
                "jetspec",
                "shared_prefix",
                "shared_prefix_split_attention",
                "merge_attention",
                "vsa",
                "mods",
                "sandwich",
                "graphormer",
            )
        ),
    ),
    "transformers": Suite(
        "on_transformers",
        "src",
        tuple(f"tests/models/{x}/test_modeling_{x}.py" for x in ("big_bird", "deepseek_v3")),
    ),
}


def run(suite: Suite, checkout: Path, options: list[str], broken: bool) -> dict[str, dict]:
    """What became of each test."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        paths = [str(checkout / suite.sources), str(HERE), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "TAB_PEER_OUT": str(out),
            "TAB_PEER_BROKEN": str(int(broken)),
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "swap", "-p", suite.adapter, *suite.tests, *options]
        subprocess.run(command, cwd=checkout, env=environment, stdout=sys.stderr)
        if not out.is_file():
            raise SystemExit(f"pytest did not run in {checkout}; what it said stands above")
        return json.loads(out.read_text())


def kind(test: dict) -> str:
    if test["outcome"] == "skipped":
        return "not applicable" if (test["why"] or "").startswith(OURS) else "skipped by the suite"
    if not test["calls"]:
        return f"{test['outcome']} without TAB"
    return test["outcome"]


KINDS = (
    "passed", "failed", "not applicable", "passed without TAB", "failed without TAB",
    "skipped by the suite",
)  # fmt: skip


def table(found: dict[str, dict], control: dict[str, dict]) -> str:
    head = ["tests of", "all", *KINDS, *(["of the passed, notice a wrong TAB"] if control else [])]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for file in dict.fromkeys(name.split("::")[0] for name in found):
        mine = {name: kind(t) for name, t in found.items() if name.split("::")[0] == file}
        count = Counter(mine.values())
        cells = [Path(file).stem, len(mine), *(count[x] for x in KINDS)]
        if control:
            passed = [name for name, x in mine.items() if x == "passed"]
            cells.append(sum(control[name]["outcome"] == "failed" for name in passed))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--out", type=Path, help="what became of each test, as JSON")
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    given, options = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
    suite, checkout = SUITES[given.suite], given.checkout.resolve()
    missing = [x for x in suite.tests if not (checkout / x).exists()]
    if missing:
        parser.error(f"{checkout} is no checkout of {given.suite}: it has no {', '.join(missing)}")
    found = run(suite, checkout, options, broken=False)
    control = run(suite, checkout, options, broken=True) if given.control else {}
    print(table(found, control) + "\n")
    told = Counter((kind(t), t["why"].removeprefix(OURS)) for t in found.values() if t["why"])
    for (what, why), count in sorted(told.items()):
        if what != "skipped by the suite":
            print(f"- {count} {what}: {why}")
    if given.out:
        given.out.write_text(json.dumps({"found": found, "control": control}, indent=1) + "\n")


if __name__ == "__main__":
    main()
