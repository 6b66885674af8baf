"""Who competes: TAB's backends, what PyTorch offers, and peers that are found installed.

A contestant is (name, function of the case's inputs) or the reason why it is not there. The eager
versions (eager.py) are what a user would write by hand; `compile` is torch.compile of the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import OPS
from . import eager
from .cases import Problem, ours


@dataclass
class Contestant:
    name: str
    build: Callable[[Problem], Callable[..., Tensor]]
    why_not: str | None = None
    differentiable: bool = True


def contestants(p: Problem) -> Iterator[Contestant]:
    """TAB first, then PyTorch, then peers; those that cannot run here carry the reason."""
    op = OPS.get("mla_decode" if p.case.decode and p.case.op == "mla" else f"{p.case.op}_fwd")
    device, gradient = p.case.device.split(":")[0], not p.case.decode
    yield Contestant("tab", lambda p: ours(p, "auto"), differentiable=gradient)
    backends = ("reference", "cpp") if device == "cpu" else ("reference", "triton", "cuda")
    for backend in backends if op else ():
        yield Contestant(
            f"tab {backend}",
            lambda p, b=backend: ours(p, b),
            why_not=op.why_not(backend),
            differentiable=gradient,
        )
    yield from PYTORCH[p.case.op](p)
    if not p.case.decode:
        yield from _peers(p)


# --- what a user would write ---------------------------------------------------------------------


def _linear(p: Problem) -> Iterator[Contestant]:
    if p.case.decode:
        return _eager_and_compiled(eager.linear_decode, differentiable=False)
    return _eager_and_compiled(partial(eager.linear, causal=p.case.causal))


def _linformer(p: Problem) -> Iterator[Contestant]:
    return _eager_and_compiled(partial(eager.linformer, heads=p.case.shape[1]))


def _performer(p: Problem) -> Iterator[Contestant]:
    w = p.fixed["projection"]
    return _eager_and_compiled(partial(eager.performer, projection=w, causal=p.case.causal))


def _banded(p: Problem) -> Iterator[Contestant]:
    """local and sparse: a dense mask under SDPA, or FlexAttention with the same pattern. Only who
    needs the mask makes it."""
    n, device, causal = p.case.shape[2], p.case.device, p.case.causal
    if p.case.op == "local":
        w, right = p.case.window, 0 if causal else p.case.window
        chunked = partial(eager.chunked_window, window=w, causal=causal)
        yield from _eager_and_compiled(chunked, name="chunked")

        def mask() -> Tensor:  # N² bytes, and no more while it is made
            return torch.ones(n, n, dtype=torch.bool, device=device).tril_(right).triu_(-w)

        def rule() -> Callable:
            return lambda b, h, qi, kj: (qi - kj <= w) & (kj - qi <= right)
    else:

        def mask() -> Tensor:
            dense = p.fixed["pattern"].to_dense().to(device)
            return dense.tril_() if causal else dense

        def rule() -> Callable:
            dense = mask().expand(p.case.shape[1], n, n)
            return lambda b, h, qi, kj: dense[h, qi, kj]

    yield Contestant("sdpa+mask", lambda _: partial(eager.masked, mask=mask()))
    for block in (64, 128):
        yield _flex(p, rule, block)


def _flex(p: Problem, rule: Callable[[], Callable], block: int) -> Contestant:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def build(p: Problem):
        _, h, n, _ = p.case.shape
        mask = create_block_mask(rule(), None, h, n, n, device=p.case.device, BLOCK_SIZE=block)
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)

    cpu = p.case.device == "cpu"
    return Contestant(f"flex-{block}", build, differentiable=not cpu)


def _mla(p: Problem) -> Iterator[Contestant]:
    if not p.case.decode:
        yield from _eager_and_compiled(partial(eager.mla, causal=p.case.causal), "expand+sdpa")
        return
    yield from _eager_and_compiled(eager.mla_decode, "absorb", differentiable=False)
    yield Contestant("absorb+sdpa", lambda _: eager.mla_decode_sdpa, differentiable=False)


def _eager_and_compiled(
    f: Callable, name: str = "eager", differentiable: bool = True
) -> Iterator[Contestant]:
    yield Contestant(name, lambda _: f, differentiable=differentiable)
    label = "compile" if name == "eager" else f"{name} compile"
    yield Contestant(
        label, lambda _: torch.compile(f, dynamic=False), differentiable=differentiable
    )


PYTORCH = {
    "linear": _linear,
    "performer": _performer,
    "local": _banded,
    "sparse": _banded,
    "mla": _mla,
    "linformer": _linformer,
}

# --- peers: never a dependency, found when installed ----------------------------------------------


def _peers(p: Problem) -> Iterator[Contestant]:
    for op, name, module, gpu_only, build in PEERS:
        if op != p.case.op:
            continue
        reason = None
        if gpu_only and not p.case.device.startswith("cuda"):
            reason = "runs on CUDA GPUs only"
        elif importlib.util.find_spec(module) is None:
            reason = f"{module} is not installed (pip install transformer-attention-bench[peers])"
        elif name == "natten" and not p.case.causal:
            reason = "its window moves inwards at both ends: another function unless causal"
        yield Contestant(name, build, why_not=reason)


def _performer_pytorch(p: Problem):
    module = importlib.import_module("performer_pytorch")
    _, _, _, d = p.case.shape
    attention = module.FastAttention(
        d, nb_features=p.fixed["projection"].shape[0], causal=p.case.causal, no_projection=False
    ).to(p.case.device, p.case.dtype)
    attention.projection_matrix.copy_(p.fixed["projection"])
    return attention


def _local_attention(p: Problem):
    module = importlib.import_module("local_attention")
    attention = module.LocalAttention(
        window_size=p.case.window,
        look_backward=1,
        look_forward=0 if p.case.causal else 1,
        causal=p.case.causal,
        exact_windowsize=True,
        use_rotary_pos_emb=False,
        autopad=True,
    ).to(p.case.device)
    b, _, n, _ = p.inputs[0].shape
    if n % p.case.window == 0:
        return attention
    real = torch.ones(b, n, dtype=torch.bool, device=p.case.device)
    return lambda q, k, v: attention(q, k, v, mask=real)  # else its own padding takes part


def _linformer_package(p: Problem):
    module = importlib.import_module("linformer.linformer")
    (_, h, n, d), rows = p.case.shape, p.inputs[2].shape[1]
    layer = module.LinformerSelfAttention(h * d, n, k=rows, heads=h).to(p.case.device)
    # The weights are ours, and its projection out is taken away.
    layer.to_out = torch.nn.Identity()
    del layer.to_q, layer.to_k, layer.to_v, layer.proj_k, layer.proj_v

    def attend(x, qkv, e):
        layer.proj_k = layer.proj_v = e
        layer.to_q, layer.to_k, layer.to_v = (partial(F.linear, weight=w) for w in qkv.chunk(3))
        return layer(x).unflatten(-1, (h, d)).transpose(1, 2)

    return attend


def _fla_linear(p: Problem):
    module = importlib.import_module("fla.ops.linear_attn")

    def attend(q, k, v):
        fq, fk = (F.elu(x.transpose(1, 2)) + 1 for x in (q, k))
        o, _ = module.chunk_linear_attn(fq, fk, v.transpose(1, 2), scale=1.0, normalize=True)
        return o.transpose(1, 2)

    return attend


def _flash_attn_window(p: Problem):
    module = importlib.import_module("flash_attn")
    w = p.case.window

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        window = (w, 0 if p.case.causal else w)
        o = module.flash_attn_func(q, k, v, causal=p.case.causal, window_size=window)
        return o.transpose(1, 2)

    return attend


def _xformers_window(p: Problem):
    ops = importlib.import_module("xformers.ops")
    bias = importlib.import_module("xformers.ops.fmha.attn_bias")
    w = p.case.window
    mask = bias.LocalAttentionFromBottomRightMask(w, 0 if p.case.causal else w)

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return ops.memory_efficient_attention(q, k, v, attn_bias=mask).transpose(1, 2)

    return attend


def _natten_window(p: Problem):
    module = importlib.import_module("natten")

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return module.na1d(q, k, v, kernel_size=p.case.window + 1, is_causal=True).transpose(1, 2)

    return attend


# op, contestant, module that must be importable, GPU only, builder
PEERS = [
    ("performer", "performer-pytorch", "performer_pytorch", False, _performer_pytorch),
    ("local", "local-attention", "local_attention", False, _local_attention),
    ("linear", "flash-linear-attention", "fla", True, _fla_linear),
    ("local", "flash-attn", "flash_attn", True, _flash_attn_window),
    ("local", "xformers", "xformers", True, _xformers_window),
    ("local", "natten", "natten", True, _natten_window),
    ("linformer", "linformer", "linformer", False, _linformer_package),
]
