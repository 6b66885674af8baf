"""What local and sparse attention share: softmax under a pattern, as PyTorch offers it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from ..benchmark import Contestant, Function, Problem, compiled


def masked(q, k, v, *, mask: Tensor, scale: float | None = None) -> Tensor:
    """A dense mask (N, N) or (H, N, N), True where a pair is seen."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def under(
    p: Problem, mask: Callable[[], Tensor], rule: Callable[[], Callable]
) -> Iterator[Contestant]:
    """A dense mask under SDPA, or FlexAttention with the same pattern. Only who needs the mask
    makes it: in `build`, so that its memory is counted there."""
    yield Contestant("sdpa+mask", lambda _: partial(masked, mask=mask()))
    gpu = p.case.device != "cpu"  # elsewhere PyTorch's FlexAttention has no backward
    for block in (64, 128):
        yield Contestant(f"flex-{block}", _flex(rule, block), differentiable=gpu)


def _flex(rule: Callable[[], Callable], block: int) -> Callable[[Problem], Function]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def build(p: Problem):
        _, h, n, _ = p.case.shape
        mask = create_block_mask(rule(), None, h, n, n, device=p.case.device, BLOCK_SIZE=block)
        flex = compiled(flex_attention)
        return lambda q, k, v: flex(q, k, v, block_mask=mask)

    return build
