"""One small call of each hot path, forward and backward, against its reference in float32:
`python bench/gpu_smoke.py cuda|cpu`. Prints a line an op; exit code 1 if one is wrong.

SMOKE names the assembler in what is printed; Triton takes it from TRITON_PTXAS_PATH.
"""

import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import tab
from tab.ops import OPS

BOUND = 2e-2  # of the largest number; bfloat16 rounds at 4e-3


def calls(device: str) -> dict[str, tuple[Callable, list[Tensor]]]:
    """Name -> op as a function of a backend and its inputs, and these in bfloat16."""
    draw = lambda *n: torch.randn(*n, device=device, dtype=torch.bfloat16) * 0.5  # noqa: E731
    q, k, v = (draw(2, 4, 128, 64) for _ in range(3))
    w = tab.orthogonal_projection(128, 64).to(device)
    pattern = tab.BlockPattern.bigbird(128, heads=4, block_size=16)
    few = tab.BlockPattern.bigbird(64, heads=4, block_size=8)
    many = [draw(1, 2, 600, 64) for _ in range(3)]  # by segments
    latent, rotary = draw(2, 128, 32), draw(2, 128, 16)
    mla = [q, draw(2, 4, 128, 16), latent, rotary, draw(4, 64, 32), draw(4, 64, 32)]
    one, rotated = draw(2, 4, 64), draw(2, 4, 16)
    lengths = torch.tensor([128, 37], dtype=torch.int32, device=device)
    counts = torch.tensor([100, 0, 37, 119], device=device)
    experts = [draw(256, 64).half(), draw(4, 64, 64).half()]  # bfloat16 is PyTorch's on Hopper
    grouped = OPS["moe_grouped"].apply
    decay = -torch.rand(2, 4, 128, device=device)
    return {
        "linear": (lambda b, *x: tab.linear_attention(*x, backend=b), [q, k, v]),
        "linear causal": (
            lambda b, *x: tab.linear_attention(*x, causal=True, backend=b),
            [q, k, v],
        ),
        "linear, long": (lambda b, *x: tab.linear_attention(*x, backend=b), many),
        "performer": (lambda b, *x: tab.performer_attention(*x, w, backend=b), [q, k, v]),
        "local": (lambda b, *x: tab.local_attention(*x, window=16, backend=b), [q, k, v]),
        "sparse": (lambda b, *x: tab.sparse_attention(*x, pattern, backend=b), [q, k, v]),
        "sparse, few tokens": (
            lambda b, *x: tab.sparse_attention(*x, few, backend=b),
            [x[:, :, :64] for x in (q, k, v)],
        ),
        "mla": (lambda b, *x: tab.mla_attention(*x, form="fused", backend=b), mla),
        "gated linear": (
            lambda b, *x: tab.gated_linear_attention(*x, decay, backend=b),
            [q, k, v],
        ),
        "mla decode": (
            lambda b, q, r, cache, *w: tab.mla_decode(q, r, cache, lengths, *w, backend=b),
            [one, rotated, torch.cat([latent, rotary], -1), *mla[-2:]],
        ),
        "experts": (
            lambda b, *x: grouped("reference" if b == "cpp" else b, *x, counts),
            experts,
        ),
    }


def results(f: Callable, backend: str, inputs: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    o = f(backend, *inputs)
    o = o[0] if isinstance(o, tuple) else o
    return [o, *torch.autograd.grad(o.square().sum(), inputs)]


def main(device: str) -> int:
    torch.manual_seed(0)
    backend, name, wrong = "triton" if device == "cuda" else "cpp", os.environ.get("SMOKE", ""), 0
    for op, (f, inputs) in calls(device).items():
        given = results(f, backend, inputs)
        truth = results(f, "reference", [x.float() for x in inputs])
        errors = [
            ((a.float() - b).abs().max() / b.abs().max()).item()
            for a, b in zip(given, truth, strict=True)
        ]
        bad = not max(errors) < BOUND
        wrong += bad
        print(f"smoke {name} {op} {backend}: {max(errors):.1e}{' WRONG' * bad}", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
