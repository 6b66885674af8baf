"""Linear attention."""

from __future__ import annotations

import importlib
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from ...layers.linear import LinearAttention
from ...ops.linear import linear_attention, linear_fwd
from ..benchmark import Benchmark, Problem, eager_and_compiled, peer
from ._softmax_free import normalised

FEATURES = {"elu1": lambda x: F.elu(x) + 1, "relu": F.relu, "identity": lambda x: x}


def eager(q, k, v, *, causal: bool = False, feature_map: str = "elu1") -> Tensor:
    """φ(q)ᵀS/φ(q)ᵀz; causal by the N×N weights, for there is no better in plain PyTorch."""
    if feature_map == "softmax":
        q, k, feature_map = q.softmax(-1), k.softmax(-2), "identity"
    fq, fk = FEATURES[feature_map](q), FEATURES[feature_map](k)
    return normalised(fq, fk, v, causal)


def eager_decode(q, k, v, s, z) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """q, k, v (B, H, 1, D), state S (B, H, D, Dv), z (B, H, D) -> o and the next state."""
    fq, fk = F.elu(q) + 1, F.elu(k) + 1
    s, z = s + fk.mT @ v, z + fk[:, :, 0]
    return (fq @ s) / (fq @ z[..., None]), (s, z)


class LinearDecode(Benchmark):
    """One token more, from the state."""

    op, differentiable = linear_fwd, False

    def problem(self, case, draw):
        b, h, _, d = case.shape
        one = [draw(b, h, 1, d) for _ in "qkv"]
        state = draw(b, h, d, d).to(draw.accumulate), draw(b, h, d).to(draw.accumulate).abs()
        return Problem(case, self, (*one, *state))

    def ours(self, p, backend):
        return lambda q, k, v, *state: linear_attention(
            q, k, v, causal=True, initial_state=state, return_state=True, backend=backend
        )

    def flops(self, p):
        b, h, _, d = p.case.shape
        return (4 * d * d * b * h,)

    def written(self, p):
        """The state is written back, beside one token of outputs."""
        q, _, _, s, z = p.inputs
        return s.nbytes + z.nbytes + q.nbytes

    def pytorch(self, p):
        return eager_and_compiled(eager_decode, differentiable=False)


class Linear(Benchmark):
    op, decode = linear_fwd, LinearDecode()

    def ours(self, p, backend):
        return partial(linear_attention, causal=p.case.causal, backend=backend)

    def flops(self, p):
        b, h, n, d = p.case.shape
        return 4 * d * d * b * h * n, 8 * d * d * b * h * n

    def pytorch(self, p):
        return eager_and_compiled(partial(eager, causal=p.case.causal))

    def peers(self, p):
        yield peer("flash-linear-attention", "fla", _fla, p, gpu_only=True)

    def part(self, layer):
        return layer if isinstance(layer, LinearAttention) else None

    def use_pytorch(self, part):
        part.attend = lambda q, k, v, key_mask: eager(q, k, v, feature_map=part.map)


def _fla(p: Problem):
    module = importlib.import_module("fla.ops.linear_attn")

    def attend(q, k, v):
        fq, fk = (F.elu(x.transpose(1, 2)) + 1 for x in (q, k))
        o, _ = module.chunk_linear_attn(fq, fk, v.transpose(1, 2), scale=1.0, normalize=True)
        return o.transpose(1, 2)

    return attend


benchmark = Linear()
