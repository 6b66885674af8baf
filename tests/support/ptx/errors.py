"""How far off the PTX of each op is that a CPU executes, on the cases of tests/ops/test_ptx*.py:

    PYTHONPATH=.:tests/support python -m ptx.errors [linear performer …]

prints, for each op and type, the largest ‖x − truth‖₂ / ‖truth‖₂ of an output and of a gradient;
truth is the textbook in float64. Of 16-bit cases each runs in bfloat16 and in float16 where the
file leaves the choice.
"""

import importlib.util
import inspect
import sys
from unittest import mock

import torch
from paths import ROOT
from proof import outputs_and_gradients, poisoned
from ptx.cases import ARCH, launchers, segments_of
from ptx.machine import executed
from torch import Tensor

CASES = {  # op -> its file, and the function that yields its cases
    "linear": ("test_ptx", "linear_cases"),
    "gated_linear": ("test_ptx_gated", "cases"),
    "gated_linear_normalized": ("test_ptx_gated", "normalized_cases"),
    "performer": ("test_ptx_performer", "cases"),
    "local": ("test_ptx", "local_cases"),
    "sparse": ("test_ptx", "sparse_cases"),
    "mla": ("test_ptx_latent", "mla_cases"),
    "moe": ("test_ptx", "moe_cases"),
}


def cases(op: str):
    """Each case once, those of bfloat16 in float16 as well."""
    name, function = CASES[op]
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tests/ops/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = getattr(module, function)
    yield from made(torch.Generator().manual_seed(0))
    if "half" in inspect.signature(made).parameters:
        more = made(torch.Generator().manual_seed(0), torch.float16)
        yield from (case for case in more if case[2][0].dtype == torch.float16)


def off(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm()).item()


def errors(op: str) -> dict[torch.dtype, list[float]]:
    """Type -> the largest error of an output, and of a gradient."""
    found: dict[torch.dtype, list[float]] = {}
    for f, exact, x in cases(op):
        with executed(ARCH), poisoned():
            given = outputs_and_gradients(f, x)
        truth = outputs_and_gradients(exact, [y.double() for y in x])
        each = [off(a, b) for a, b in zip(given, truth, strict=True)]
        outputs = len(each) - len(x)
        worst = found.setdefault(x[0].dtype, [0.0, 0.0])
        worst[:] = max(worst[0], *each[:outputs]), max(worst[1], *each[outputs:])
    return found


if __name__ == "__main__":
    from tab.kernels import moe, sparse

    cut, steps = mock.patch.object(sparse, "CUT", 2), mock.patch.object(moe, "STEPS", 1)
    with launchers(), segments_of(128), cut, steps:
        for op in sys.argv[1:] or CASES:
            for dtype, worst in errors(op).items():
                print(
                    f"| `{op}` | {str(dtype)[6:]} | {worst[0]:.0e} | {worst[1]:.0e} |", flush=True
                )
