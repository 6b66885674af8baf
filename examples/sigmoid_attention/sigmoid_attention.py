"""Sigmoid attention: o_i = Σ_j σ(q_i·k_j/√D) v_j / N. No softmax, so no key competes with another.

pip install ./examples/sigmoid_attention
tab compare --attentions none,multi_head,sigmoid --recipe quick --data shapes
"""

from torch import Tensor
from torch.nn import functional as F

from tab.layers import HeadsAttention, register_attention


@register_attention("sigmoid")
class SigmoidAttention(HeadsAttention):
    """HeadsAttention projects x (B, N, C) to q, k, v (B, H, N, D), and the heads' outputs back."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        a = (q @ k.mT * q.shape[-1] ** -0.5).sigmoid()  # (B, H, N, N)
        if key_mask is not None:
            a = a.masked_fill(~key_mask[:, None, None, :], 0.0)
        return a @ v / k.shape[-2]

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """For the pictures of attention matrices; each row sums to 1."""
        return F.normalize((q @ k.mT * q.shape[-1] ** -0.5).sigmoid(), p=1, dim=-1)
