"""The matrix of docs/features.md, cell by cell: what it calls "yes" runs, forward and backward, and
what it calls "no" is an error."""

import re
from functools import partial

import pytest
import torch
from paths import ROOT

import tab
from tab.ops import OPS

COLUMNS = ("reference", "cpp", "triton", "cuda")
B, H, N, D, DV = 2, 4, 12, 8, 8


def matrix():
    """(op, feature, backend, cell) of every table."""
    op = None
    for line in (ROOT / "docs/features.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            op = line[3:]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[0] not in ("feature", "---"):
            for backend, cell in zip(COLUMNS, cells[1:5], strict=True):
                yield op, re.match(r"\w+", cells[0]).group(), backend, cell, cells[5]


CELLS = list(matrix())


def inputs(op, device, feature):
    """q, k, v, or what mla takes in their place; in the shapes that a feature asks for."""
    g = torch.Generator().manual_seed(0)
    heads = 2 if feature == "fewer" else H
    keys = N + 4 if feature == "N_q" else N
    dv = 5 if feature == "Dv" else DV
    b = 1 if feature == "cu_seqlens" else B
    if op == "mla":
        shapes = ((b, H, N, D), (b, H, N, 4), (b, keys, 6), (b, keys, 4), (H, D, 6), (H, dv, 6))
        if feature == "fewer":
            shapes = (*shapes[:4], (2, D, 6), (2, dv, 6))
    else:
        shapes = ((b, H, N, D), (b, heads, keys, D), (b, heads, keys, dv))
    x = [torch.randn(s, generator=g).to(device) for s in shapes]
    if feature == "layout":
        turn = 2 if op == "mla" else 3
        x = [t.transpose(1, 2).contiguous() if i < turn else t for i, t in enumerate(x)]
    return [t.requires_grad_() for t in x]


def call(op, x, backend, device, **options):
    if op not in ("linformer", "h2o"):  # these have no kernels to choose from
        options["backend"] = backend
    x, given = [*x], {
        "mla": {"form": "fused"}, "local": {"window": (4, 3)},
        "h2o": {"heavy": 3, "recent": 2, "block": 4},
    }  # fmt: skip
    if op == "gated_linear":
        x.append(torch.full((x[1].shape[2 if options.get("layout") else 1],), -0.1, device=device))
    if op == "performer":
        x.append(torch.ones(3, D, device=device) / 3)
    if op == "sparse":
        pattern = partial(tab.BlockPattern.sliding_window, window=2, sinks=1, block_size=4)
        keys = x[1].shape[1 if "layout" in options else 2]
        x.append(pattern if "cu_seqlens" in options else pattern(keys).tail(N))
    if op == "linformer":
        x.append(torch.ones(x[1].shape[1 if "layout" in options else 2], 3, device=device) / N)
    return getattr(tab, f"{op}_attention")(*x, **given.get(op, {}), **options)


def options_of(op, feature, device):
    if feature == "key_mask":
        return {"key_mask": torch.arange(N, device=device).expand(B, N) < N - 3}
    if feature == "state":
        rows = {"linear": D, "performer": 3}.get(op, 1)
        width = (DV,), (), ()
        if op == "gated_linear":
            return {"initial_state": torch.ones(B, H, D, DV, device=device), "return_state": True}
        state = [torch.ones(B, H, rows, *w, device=device) for w in width[: 2 + (op != "linear")]]
        return {"causal": True, "initial_state": tuple(state), "return_state": True}
    if feature == "sinks":
        return {"sinks": torch.linspace(-1, 1, H, device=device).requires_grad_()}
    if feature == "alibi":
        return {"alibi": torch.linspace(0.1, 1, H, device=device)}
    return {
        "causal": {"is_causal": True}, "softcap": {"softcap": 2.0}, "layout": {"layout": "bnhd"},
        "return_lse": {"return_lse": True}, "dropout_p": {"dropout_p": 0.1},
        "cu_seqlens": {"cu_seqlens": torch.tensor([0, 5, N], dtype=torch.int32, device=device)},
    }.get(feature, {})  # fmt: skip


def results(op, feature, backend, device):
    """-> all outputs, and what stands for the sum of each that has a gradient."""
    x, options = inputs(op, device, feature), options_of(op, feature, device)
    out = call(op, x, backend, device, **options)
    x += [t for t in options.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    flat = [out] if isinstance(out, torch.Tensor) else [out[0], *_flat(out[1:])]
    return x, flat, sum(o.sin().sum() for o in flat if o.requires_grad)


def _flat(tree):
    return [tree] if isinstance(tree, torch.Tensor) else [x for part in tree for x in _flat(part)]


def check(op, feature, backend, cell, device):
    if cell == "–":
        with pytest.raises(TypeError, match="unexpected keyword argument 'backend'"):
            getattr(tab, f"{op}_attention")(*inputs(op, device, ""), backend=backend)
        return
    if cell == "no":
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            results(op, feature, backend, device)
        return
    x, given, total = results(op, feature, backend, device)
    if cell == "forward":
        with pytest.raises(RuntimeError, match="has no gradient of"):
            torch.autograd.grad(total, x, allow_unused=True)
        return
    assert cell == "yes"
    grads = torch.autograd.grad(total, x)
    x, want, total = results(op, feature, "reference", device)
    wanted = torch.autograd.grad(total, x)
    for a, b in zip((*given, *grads), (*want, *wanted), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("op", "feature", "backend", "cell"),
    [x[:4] for x in CELLS if x[2] in ("reference", "cpp")],
)
def test_cell(op, feature, backend, cell):
    if backend == "cpp" and cell in ("yes", "forward"):
        assert OPS[f"{op}_fwd"].why_not("cpp") is None, "build the C++ kernels to run the tests"
    check(op, feature, backend, cell, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "feature", "backend", "cell"), [x[:4] for x in CELLS if x[2] in ("triton", "cuda")]
)
def test_cell_on_gpu(op, feature, backend, cell):
    check(op, feature, backend, cell, "cuda")


def test_the_matrix_is_whole():
    """Every op and feature once on each backend, and a reason wherever something is missing."""
    ops = {name.removesuffix("_attention") for name in tab.functional.__all__ if "_att" in name}
    features = {x[1] for x in CELLS}
    assert {x[0] for x in CELLS} == ops - {"merge"} and len(features) == 13
    assert len(CELLS) == len({x[:3] for x in CELLS}) == (len(ops) - 1) * 13 * 4
    for *cell, text, why in CELLS:
        assert text in ("yes", "forward", "no", "–"), cell
        assert bool(why) == any(
            x[3] in ("no", "forward") for x in CELLS if x[:2] == tuple(cell[:2])
        )
