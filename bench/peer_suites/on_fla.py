"""flash-linear-attention's functions of linear attention, retention and simple GLA, by TAB.

A test that compares two of its kernels would compare TAB with itself. So only the tests of
`fused_recurrent_*` call TAB by that name; in all others, where it is the measure, the peer's own
naive function in chunks takes its place.
"""

import sys
import warnings
from collections.abc import Callable
from itertools import pairwise

import fla.ops.linear_attn
import fla.ops.retention
import fla.ops.simple_gla
import fla.utils
import pytest
import torch
from fla.ops.linear_attn import naive as naive_linear
from fla.ops.simple_gla import naive as naive_gla
from swap import not_applicable, ours
from torch.utils.checkpoint import checkpoint

import tab

fla.utils.device, fla.utils.device_torch_lib = "cpu", torch.cpu
measured = True  # whether fused_recurrent_* is what the test is about


@pytest.fixture(autouse=True)
def _what_is_measured(request):
    global measured
    name = request.node.name
    measured = name.startswith("test_fused_recurrent") or name.startswith("test_normalize")


@ours
def gated(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False,
    reverse=False, state_v_first=False, cu_seqlens=None, output_attentions=False, **others,
):  # fmt: skip
    """simple GLA: o, and the state or, of the parallel form, the weights. How the peer cuts the
    sequence (chunk_size) is its kernels' own affair."""
    if reverse:
        not_applicable("no reversed scan: flip the tokens")
    if "transpose_state_layout" in others:  # its old name, which the peer's tests hold it to
        if state_v_first:
            raise ValueError("state_v_first and transpose_state_layout are one")
        warnings.warn("now state_v_first", DeprecationWarning, stacklevel=2)
        state_v_first = others["transpose_state_layout"]
    decay = g_gamma if g is None else g
    decay = torch.zeros(q.shape[2]) if decay is None else decay
    s0 = initial_state
    if s0 is not None:
        s0 = (s0.transpose(-1, -2) if state_v_first else s0).float()
    options = {"scale": scale, "layout": "bnhd"}
    o, s = tab.gated_linear_attention(
        q, k, v, decay, **options, initial_state=s0, return_state=True, cu_seqlens=cu_seqlens
    )
    if output_attentions:  # the weights are what the identity becomes as v: (B, H, T, T)
        one = torch.eye(q.shape[1], dtype=q.dtype)[None, :, None].expand(*q.shape[:3], -1)
        return o, tab.gated_linear_attention(q, k, one, decay, **options).transpose(1, 2)
    s = s.transpose(-1, -2) if state_v_first else s
    return o, s if output_final_state else None


def retention(q, k, v, **options):
    rates = 1 - 2.0 ** (-5 - torch.arange(q.shape[2], dtype=torch.float32))
    return gated(q, k, v, g_gamma=rates.log(), **options)


def linear(q, k, v, scale=None, initial_state=None, normalize=True, cu_seqlens=None, **options):
    if normalize:
        return normalized(q, k, v, initial_state, cu_seqlens)
    return gated(q, k, v, None, None, scale, initial_state, cu_seqlens=cu_seqlens, **options)


@ours
def normalized(q, k, v, initial_state, cu_seqlens):
    """There z is (B, 1, H, D), and the scale cancels."""
    if initial_state is not None:
        initial_state = initial_state[0], initial_state[1].squeeze(1)
    o, (s, z) = tab.linear_attention(
        q, k, v, feature_map="identity", causal=True, layout="bnhd", return_state=True,
        initial_state=initial_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return o, (s, z[:, None])


# --- the peer's naive functions as measure --------------------------------------------------------


def naive_chunks(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False,
    cu_seqlens=None, **_,
):  # fmt: skip
    if g is None:
        g = torch.zeros(q.shape[2]) if g_gamma is None else g_gamma
        g = g.expand(q.shape[:3])
    ends = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    parts, states = [], []
    for i, (a, b) in enumerate(pairwise(ends)):
        s0 = initial_state
        if s0 is not None:
            s0 = (s0 if cu_seqlens is None else s0[i : i + 1]).float()
        x = (t[:, a:b] for t in (q, k, v, g))
        o, s = naive_gla.naive_chunk_simple_gla(*x, s0, True, scale=scale)
        parts.append(o)
        states.append(s)
    return torch.cat(parts, 1).to(q.dtype), torch.cat(states) if output_final_state else None


def in_pieces(naive: Callable, tokens: int = 64) -> Callable:
    """The peer's recurrence, which saves a state for each token: its larger cases want 30 GB. In
    pieces, whose states are computed once more for the gradient, it gives the same numbers."""

    def run(q, k, v, g=None, initial_state=None, output_final_state=False, **options):
        if options.pop("normalize", False):
            options |= {"initial_state": initial_state, "output_final_state": output_final_state}
            return naive(q, k, v, normalize=True, **options)
        x = [q, k, v] if g is None else [q, k, v, g]
        parts, state = [], initial_state

        def piece(state, *x):
            return naive(*x, initial_state=state, output_final_state=True, **options)

        for i in range(0, q.shape[1], tokens):
            cut = (t[:, i : i + tokens] for t in x)
            o, state = checkpoint(piece, state, *cut, use_reentrant=False)
            parts.append(o)
        return torch.cat(parts, 1), state if output_final_state else None

    return run


def by_name(function: Callable, measure: Callable) -> Callable:
    return lambda *args, **kwargs: (function if measured else measure)(*args, **kwargs)


def naive_retention(q, k, v, **options):
    rates = 1 - 2.0 ** (-5 - torch.arange(q.shape[2], dtype=torch.float32))
    return naive_chunks(q, k, v, g_gamma=rates.log(), **options)


def naive_unnormalized(q, k, v, normalize=False, **options):
    assert not normalize
    return naive_chunks(q, k, v, **options)


def swap() -> None:
    new = {
        "naive_recurrent_linear_attn": in_pieces(naive_linear.naive_recurrent_linear_attn),
        "naive_recurrent_simple_gla": in_pieces(naive_gla.naive_recurrent_simple_gla),
        "fused_recurrent_linear_attn": by_name(
            lambda *x, normalize=False, **o: linear(*x, normalize=normalize, **o),
            naive_unnormalized,
        ),
        "fused_recurrent_retention": by_name(retention, naive_retention),
        "fused_recurrent_simple_gla": by_name(gated, naive_chunks),
        "parallel_retention": retention,
        "parallel_simple_gla": gated,
    }
    for form in ("chunk", "fused_chunk"):
        new |= {
            f"{form}_linear_attn": linear,
            f"{form}_retention": retention,
            f"{form}_simple_gla": gated,
        }
    for name, module in list(sys.modules.items()):
        if name.startswith("fla."):
            for old in new.keys() & vars(module).keys():
                setattr(module, old, new[old])


swap()
