"""FlexAttention in the tests of its authors' Attention Gym, by TAB: `flex_attention` is read back
from what its mask and its rule for the scores do, pair by pair, and answered by
tab.local_attention where that is a window, else by tab.sparse_attention.

Most of these tests ask for a GPU, though nothing in them needs one: "cuda" is read as "cpu".
`torch.compile` gives back the function, as there is nothing of FlexAttention left to compile.
"""

import math

import attn_gym.utils
import torch
from swap import not_applicable, ours
from torch.nn.attention import flex_attention as flex
from torch.overrides import TorchFunctionMode

import tab

# --- a GPU, which there is none of ----------------------------------------------------------------


def on_cpu(x):
    named = isinstance(x, str) and x.startswith("cuda")
    return "cpu" if named or (isinstance(x, torch.device) and x.type == "cuda") else x


class OnCPU(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: on_cpu(x) for name, x in (kwargs or {}).items()}
        return func(*map(on_cpu, args), **kwargs)


OnCPU().__enter__()
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (8, 0)
torch.compile = lambda function=None, **_: function or (lambda f: f)

# --- what the mask and the scores do --------------------------------------------------------------


def every(b: int, h: int, n: int, m: int) -> list[torch.Tensor]:
    """Indices of batch, head, query and key, which broadcast to all pairs."""
    sizes = (b, 1, 1, 1), (1, h, 1, 1), (1, 1, n, 1), (1, 1, 1, m)
    return [torch.arange(math.prod(s), dtype=torch.int32).view(s) for s in sizes]


def ruled(mask, q, k) -> torch.Tensor:
    """(B or 1, H or 1, N, N_k) bool: what the mask's rule shows."""
    n, m = q.shape[2], k.shape[2]
    if mask is None:
        return torch.ones(1, 1, n, m, dtype=torch.bool)
    sizes = mask.shape[0] or 1, mask.shape[1] or 1, n, m
    return torch.zeros(sizes, dtype=torch.bool) | mask.mask_mod(*every(*sizes))


def seen_pairs(mask, q, k) -> torch.Tensor:
    """The same within the blocks that the mask lists: the rule may show more."""
    seen = ruled(mask, q, k)
    if mask is None:
        return seen
    rows, columns = mask.BLOCK_SIZE
    listed = mask.to_dense().bool().repeat_interleave(rows, 2).repeat_interleave(columns, 3)
    return seen & listed[:, :, : seen.shape[2], : seen.shape[3]]


def score_rules(score_mod, q, k, seen) -> dict:
    """The softcap and the slopes that do what score_mod does."""
    (b, h, n, _), m = q.shape, k.shape[2]
    if score_mod is None:
        return {}
    places, shape, rules = every(b, h, n, m), (b, h, n, m), {}
    bias = score_mod(torch.zeros(shape), *places)
    if bias.requires_grad:
        not_applicable("a learned bias of any values on the scores: of these TAB has ALiBi's")
    cap = score_mod(torch.full(shape, 1e9), *places) - bias
    if cap.max() < 1e8:
        rules["softcap"] = cap.flatten()[0].item()
    apart = (places[2] + (m - n) - places[3]).abs()
    far = seen & (apart > 0)
    slopes = torch.where(far, -bias / apart.clamp(min=1), 0.0).amax((0, 2, 3))
    if slopes.any():
        rules["alibi"] = slopes
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 30
    c = rules.get("softcap")
    said = (x if c is None else c * (x / c).tanh()) - slopes[:, None, None] * apart
    if not torch.allclose(
        score_mod(x, *places)[seen.expand(shape)], said[seen.expand(shape)], atol=1e-3
    ):
        not_applicable("a bias of any values on the scores: of these TAB has ALiBi's")
    return rules


def window(seen) -> tuple[int, int] | None:
    """(left, right), if everybody sees so far from the place at which it stands."""
    n, m = seen.shape
    step = torch.arange(m) - (torch.arange(n)[:, None] + (m - n))
    if not seen.any():
        return None
    left, right = max(0, -step[seen].min().item()), max(0, step[seen].max().item())
    return (left, right) if torch.equal(seen, (step >= -left) & (step <= right)) else None


def pattern(seen) -> tab.BlockPattern:
    """Of (H or 1, N, N_k), in the largest blocks that are seen whole or not at all."""
    _, n, m = seen.shape
    for size in (128, 64, 32, 16, 8, 4, 2, 1):
        pad = (0, -m % size, 0, -n % size)
        blocks = [
            torch.nn.functional.pad(seen.float(), pad, value=v)
            .unflatten(2, (-1, size))
            .unflatten(1, (-1, size))
            for v in (0.0, 1.0)
        ]
        most, least = blocks[0].amax((2, 4)) > 0, blocks[1].amin((2, 4)) > 0
        if torch.equal(most, least):
            return tab.BlockPattern.from_blocks(
                most if len(seen) > 1 else most[0], size, n, n_keys=m
            )
    raise AssertionError("blocks of one token hold any mask")


def attend(q, k, v, seen, options):
    """seen (H or 1, N, N_k)"""
    if len(seen) == 1 and (reach := window(seen[0])):
        return tab.local_attention(q, k, v, window=reach, **options)
    return tab.sparse_attention(q, k, v, pattern(seen), **options)


@ours
def answer(q, k, v, score_mod, block_mask, scale=None, enable_gqa=False):
    with torch.no_grad():
        seen = seen_pairs(block_mask, q, k)
        options = score_rules(score_mod, q, k, seen)
    options |= {"scale": scale, "return_lse": True}
    entries = [x.split(1) if len(seen) > 1 else [x] for x in (q, k, v)]
    outs = [attend(*x, options) for x in zip(*entries, seen, strict=True)]
    return tuple(torch.cat(x) for x in zip(*outs, strict=True))


def flex_attention(q, k, v, score_mod=None, block_mask=None, *, return_aux=None, **options):
    """Some of these tests hold TAB against TAB, under two names of one mask or rule: so each call
    is held against FlexAttention's own formula, too, which on a CPU goes forward alone, and reads
    the rule of the mask and not its blocks."""
    options.pop("kernel_options", None)
    if return_aux is not None and return_aux.max_scores:
        not_applicable("the largest score of each query")
    o, lse = answer(q, k, v, score_mod, block_mask, **options)
    if torch.equal(ruled(block_mask, q, k), seen_pairs(block_mask, q, k)):
        x = (t.detach() for t in (q, k, v))
        own, aux = theirs(
            *x, score_mod, block_mask, return_aux=flex.AuxRequest(lse=True), **options
        )
        torch.testing.assert_close(o, own, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(lse, aux.lse.to(lse.dtype), atol=2e-3, rtol=2e-3)
    return o if return_aux is None else (o, flex.AuxOutput(lse=lse if return_aux.lse else None))


theirs = flex.flex_attention


@ours
def merge(out, lse, other_out, other_lse):
    """Theirs gives the type of the lse."""
    out, other_out = out.to(lse.dtype), other_out.to(lse.dtype)
    return tab.merge_attention(out, lse, other_out, other_lse)


flex.flex_attention = flex_attention
attn_gym.utils.merge_attention = merge
