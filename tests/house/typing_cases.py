"""What a type checker sees of the public names: read by `make lint`, run by nobody."""

from pathlib import Path
from typing import assert_type

from torch import Tensor, nn

import tab
from tab import H2OCache, linear_attention


def public(q: Tensor, state: tuple[Tensor, Tensor], yes: bool) -> None:
    assert_type(linear_attention(q, q, q), Tensor)
    assert_type(tab.linear_attention(q, q, q, feature_map="relu", backend="cpp"), Tensor)
    assert_type(
        tab.linear_attention(q, q, q, initial_state=state, return_state=True),
        tuple[Tensor, tuple[Tensor, Tensor]],
    )
    assert_type(
        tab.performer_attention(q, q, q, tab.orthogonal_projection(4, 4), return_state=True),
        tuple[Tensor, tuple[Tensor, Tensor, Tensor]],
    )
    assert_type(tab.performer_attention(q, q, q, q, return_state=False), Tensor)
    assert_type(tab.mla_attention(q, q, q, q, q, q, form="expand"), Tensor)
    assert_type(tab.local_attention(q, q, q, window=(2, 3)), Tensor)
    assert_type(tab.BlockPattern.bigbird(64, heads=2), tab.BlockPattern)
    assert_type(H2OCache(heavy=2, recent=2).step(q, q, q), Tensor)
    assert_type(tab.layers.get_attention("self"), type[tab.layers.Attention])
    assert_type(tab.swap_attention(nn.Linear(1, 1), "performer", seq_len=4), nn.Module)
    assert_type(tab.compare(["none", "linear"], seeds=2), tab.api.Comparison)
    assert_type(tab.sweep("self", "mlp", epochs=(1, 2)), tab.api.Sweep)
    assert_type(tab.bench("linear", processes=1).directory, Path | None)
    assert_type(tab.load_study("results/x"), tab.api.Comparison | tab.api.Sweep)
    with tab.use_backend("reference"):
        pass


def refused(q: Tensor) -> None:
    """An ignore that nothing needs is an error: so each of these is one."""
    tab.linear_attention(q, q, q, feature_map="gelu")  # type: ignore[call-overload]
    tab.local_attention(q, q, q, window=2, backend="gpu")  # type: ignore[call-overload]
    tab.mla_attention(q, q, q, q, q, q, form="fast")  # type: ignore[call-overload]
    tab.use_backend("fast")  # type: ignore[arg-type]
    tab.compare(seed=1)  # type: ignore[call-arg]
    _ = tab.nothing  # type: ignore[attr-defined]
