"""What Triton launches at the sizes of `tab bench`, counted without a GPU.

    python bench/launches.py sparse linear    # programs, registers, instructions
    python bench/launches.py sparse --host    # and what a launch costs the CPU: by Triton / by TAB

Instructions are those of the code, for each warp: a kernel without a loop executes as many. Issued
four a cycle on each of 132 processors, those of all programs take issue_us, which is a floor. The
CPU's time is taken with a driver that launches nothing.
"""

import argparse
import re
import statistics
import subprocess
import tempfile
import time
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from tab.bench.cases import SIZES
from tab.bench.ops.performer import FEATURES
from tab.doctor import kernel_report
from tab.kernels import _launch

_launch.load()
BLOCK, WINDOW = {"cifar": 8, "vision": 64, "long": 64}, {"cifar": 8, "vision": 128, "long": 128}
ISSUED = 132 * 4 * 1.755e3  # instructions a microsecond: H100, boost clock


def calls(op: str, size: str, causal: bool):
    """(launcher, arguments) of forward and backward, on meta tensors."""
    b, h, n, d = SIZES[size].values()
    q, meta = _launch.meta_heads(b, h, n, d, torch.bfloat16), _launch.meta_tensor
    lse = meta(b, h, n)
    kind = f"{op}_stateless" if f"{op}_stateless_fwd" in _launch.LAUNCHERS else op
    forward, backward = (_launch.LAUNCHERS[f"{kind}_{way}"].run for way in ("fwd", "bwd"))
    if op == "linear":
        s, z = meta(b, h, d, d), meta(b, h, d)
        options = None, None, None, 0, causal, 0.0
        return (forward, (q, q, q, *options)), (
            backward,
            (q, None, None, q, q, q, q, s, z, *options),
        )
    if op == "performer":
        w, s, z = meta(FEATURES, d), meta(b, h, FEATURES, d), meta(b, h, FEATURES)
        options = *(None,) * 4, 0, causal
        return (forward, (q, q, q, w, *options, 0.0)), (
            backward,
            (q, None, None, q, q, q, w, q, s, z, z, lse, *options),
        )
    if op == "gated_linear":
        options = q, q, q, _launch.meta_heads(b, h, n, 1, torch.float32), None, None, 0.125
        return (forward, options), (backward, (q, None, *options))
    if op == "local":
        side = WINDOW[size] // 2
        options = None, None, side, side, 0, 0, causal, 0.125, 0.0
    else:
        nb = -(-n // BLOCK[size])
        ptr, col = meta(h, nb + 1, dtype=torch.int32), meta(h * nb * 4, dtype=torch.int32)
        options = ptr, col, ptr, col, None, None, BLOCK[size], causal, 0.125, 0.0
    return (forward, (q, q, q, *options)), (backward, (q, q, q, q, q, lse, *options))


def launched(run, args):
    found = []
    with _launch.recording(lambda kernel, grid, *x, **o: found.append((kernel, grid, x, o))):
        run(*args)
    return found


def instructions(code) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        command = [kernel_report._cuobjdump(), "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/(?!.*\bNOP\b)", text, re.M))


def counted(launch):
    """-> the row of `tab doctor --kernels`, and the compiled code."""
    kernel, _, args, options = launch
    codes, compiling = [], triton.compile
    with mock.patch.object(
        triton, "compile", lambda *x, **o: codes.append(compiling(*x, **o)) or codes[-1]
    ):
        row = kernel_report.compiled("", kernel_report.Launch(kernel, args, options), 90)
    return row, codes[0]


class Nothing:
    """A driver of a GPU that is not there: a launch ends where CUDA's would begin."""

    class utils:
        load_binary = staticmethod(lambda *_: (1, 2, 32, 0, 1024))
        get_device_properties = staticmethod(lambda _: {"max_shared_mem": 232448})

    launcher_cls = staticmethod(lambda *_: lambda *_: None)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda _: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


def host(launch, turns: int = 15, each: int = 200) -> tuple[float, float]:
    """µs of CPU time for a launch by Triton and by TAB, in turns; medians."""
    kernel, grid, args, options = launch
    args = [torch.empty(64, dtype=x.dtype) if torch.is_tensor(x) else x for x in args]
    ways = (
        lambda: kernel[grid](*args, **options),
        lambda: _launch.dispatch(kernel, grid, 0, (*args,), options),
    )
    times = [], []
    for _ in range(turns):
        for way, found in zip(ways, times, strict=True):
            start = time.thread_time()
            for _ in range(each):
                way()
            found.append((time.thread_time() - start) / each * 1e6)
    return tuple(map(statistics.median, times))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = "linear", "gated_linear", "performer", "local", "sparse"
    parser.add_argument("ops", nargs="+", choices=known)
    parser.add_argument("--sizes", default="cifar,vision,long")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--host", action="store_true", help="time what a launch costs the CPU")
    given = parser.parse_args()
    if given.host:
        triton.runtime.driver.set_active(Nothing())
    print("op size kernel programs warps registers spilled resident instructions issue_us host_us")
    for op in given.ops:
        for size in given.sizes.split(","):
            for call in calls(op, size, given.causal):
                for launch in launched(*call):
                    row, code = counted(launch)
                    programs, warps = torch.tensor(launch[1]).prod().item(), code.metadata.num_warps
                    count = instructions(code)
                    issue = programs * warps * count / ISSUED
                    cost = "/".join(f"{t:.1f}" for t in host(launch)) if given.host else "–"
                    print(
                        op, size, row["kernel"], programs, warps, row["registers"], row["spilled"],
                        row["warps"], count, f"{issue:.1f}", cost, flush=True,
                    )  # fmt: skip


if __name__ == "__main__":
    main()
