"""FAVOR+ attention (Performer)."""

from __future__ import annotations

import importlib
from functools import partial

from torch import Tensor

from ...layers.performer import PerformerAttention
from ...ops.performer import performer_attention, performer_fwd
from ...ops.projection import orthogonal_projection
from ..benchmark import Benchmark, Problem, eager_and_compiled, peer
from ._softmax_free import normalised

FEATURES = 256  # M


def eager(q, k, v, projection, *, causal: bool = False) -> Tensor:
    """FAVOR+ with one shift for all keys of a head; projection (M, D)."""
    w = projection.to(q.dtype)

    def features(x, shift_over):
        y = (x * x.shape[-1] ** -0.25) @ w.mT - 0.5 * x.shape[-1] ** -0.5 * (x * x).sum(
            -1, keepdim=True
        )
        return (y - y.amax(shift_over, keepdim=True)).exp()

    return normalised(features(q, -1), features(k, (-1, -2)), v, causal)


class Performer(Benchmark):
    op = performer_fwd
    exact = False  # each package stabilises its features in a way of its own

    def problem(self, case, draw):
        found, d = super().problem(case, draw), case.shape[-1]
        projection = orthogonal_projection(FEATURES, d, generator=draw.generator)
        found.fixed["projection"] = projection.to(case.device, draw.accumulate)
        return found

    def ours(self, p, backend):
        w, causal = p.fixed["projection"], p.case.causal
        return partial(performer_attention, projection=w, causal=causal, backend=backend)

    def flops(self, p):
        b, h, n, d = p.case.shape
        return 8 * d * FEATURES * b * h * n, 16 * d * FEATURES * b * h * n

    def exponentials(self, p):
        b, h, n, _ = p.case.shape
        return 2 * b * h * n * FEATURES

    def pytorch(self, p):
        w = p.fixed["projection"]
        return eager_and_compiled(partial(eager, projection=w, causal=p.case.causal))

    def peers(self, p):
        yield peer("performer-pytorch", "performer_pytorch", _performer_pytorch, p)

    def part(self, layer):
        return (
            layer if isinstance(layer, PerformerAttention) and layer.kernel == "softmax" else None
        )

    def use_pytorch(self, part):
        part.attend = lambda q, k, v, key_mask: eager(q, k, v, part.projection)


def _performer_pytorch(p: Problem):
    module, w = importlib.import_module("performer_pytorch"), p.fixed["projection"]
    attention = module.FastAttention(
        p.case.shape[-1], nb_features=w.shape[0], causal=p.case.causal, no_projection=False
    ).to(p.case.device, p.case.dtype)
    attention.projection_matrix.copy_(w)
    return attention


benchmark = Performer()
