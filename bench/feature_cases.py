"""The cases of features.py: each op with one feature and without it, and the same function by
FlexAttention and by SDPA where these compute it."""

import functools
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import tab
from tab.bench.benchmark import compiled

WIDTH, WINDOW, BLOCK = 64, 128, 64
LATENT, ROTARY = 64, 16  # of mla
PARTS = 16  # sequences of a packed batch
NOTHING = "none of them"


class Call(NamedTuple):
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    leaves: list[Tensor]


class Case(NamedTuple):
    op: str
    feature: str
    ours: Call
    without: Call
    flex: Call | None = None
    sdpa: Call | None = None


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Token by token in memory, as a projection gives them: (B, H, N, D), or less."""
    g = torch.Generator().manual_seed(0)
    drawn = [
        torch.randn(s[0], s[2], s[1], s[3], generator=g).transpose(1, 2)
        if len(s) == 4
        else torch.randn(s, generator=g) / 4
        for s in shapes
    ]
    return [x.requires_grad_() for x in drawn]


def lengths(tokens: int) -> list[int]:
    """A packed batch: 16 sequences from tokens/64 to tokens/8 or so."""
    draw = random.Random(0)
    parts = [draw.randint(tokens // 64, tokens // 10) for _ in range(PARTS - 1)]
    return [*parts, tokens - sum(parts)]


# --- local and sparse: the same under a mask by PyTorch -------------------------------------------


def by_flex(
    seen: Callable, n: int, bend: Callable | None = None, keys: int | None = None, **options
) -> Callable:
    """FlexAttention, compiled. seen: which pairs; bend: of the scores."""
    mask = create_block_mask(seen, None, None, n, keys or n, device="cpu", BLOCK_SIZE=BLOCK)
    return partial(compiled(flex_attention), block_mask=mask, score_mod=bend, **options)


def by_sdpa(mask: Tensor) -> Callable:
    return partial(F.scaled_dot_product_attention, attn_mask=mask, enable_gqa=True)


def capped(s, b, h, i, j):
    return 30 * torch.tanh(s / 30)


def sloped(slopes: Tensor) -> Callable:
    return lambda s, b, h, i, j: s - slopes[h] * (i - j).abs()


def falling(slopes: Tensor, seen: Tensor) -> Tensor:
    """The same as a mask of SDPA, (H, N, N)."""
    i = torch.arange(len(seen))
    bias = -slopes[:, None, None] * (i[:, None] - i).abs()
    return bias.masked_fill(~seen, -torch.inf)


def softmax(op: str, attend: Callable, seen: Callable, heads: int, n: int) -> Iterator[Case]:
    i = torch.arange(n)
    dense = seen(0, 0, i[:, None], i)
    real = i < n // 2
    slopes, sinks = 2.0 ** -torch.arange(1.0, heads + 1), torch.linspace(-1, 1, heads)
    q, k, v = leaves(*[(1, heads, n, WIDTH)] * 3)
    plain = Call(attend, [q, k, v])
    grouped = [q, *leaves(*[(1, heads // 4, n, WIDTH)] * 2)]

    def padded(b, h, i, j):
        return seen(b, h, i, j) & real[j]

    flex = by_flex(seen, n)
    rows: dict[str, tuple] = {
        NOTHING: ({}, flex, by_sdpa(dense)),
        "grouped heads, H_kv = H/4": ({}, by_flex(seen, n, enable_gqa=True), by_sdpa(dense)),
        "key_mask, all real": ({"key_mask": (i >= 0)[None]}, flex, by_sdpa(dense)),
        "key_mask, half padding": (
            {"key_mask": real[None]}, by_flex(padded, n), by_sdpa(dense & real),
        ),
        "softcap": ({"softcap": 30.0}, by_flex(seen, n, capped), None),
        "alibi": (
            {"alibi": slopes}, by_flex(seen, n, sloped(slopes)), by_sdpa(falling(slopes, dense)),
        ),
        "sinks": ({"sinks": sinks}, None, None),
        "return_lse": ({"return_lse": True}, None, None),
    }  # fmt: skip
    for feature, (options, other, sdpa) in rows.items():
        x = grouped if feature.startswith("grouped") else plain.leaves
        yield Case(
            op, feature, Call(partial(attend, **options), x), plain,
            other and Call(other, x), sdpa and Call(sdpa, x),
        )  # fmt: skip


def packings(n: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, cu_seqlens and the sequence of each token: of as many lengths, and of one, which is
    the arithmetic of the dense batch; sequences of many lengths have more pairs of tokens."""
    for name, parts in (("many lengths", lengths(n)), ("one length", [n // PARTS] * PARTS)):
        cu = torch.tensor([0, *parts]).cumsum(0).int()
        yield f"cu_seqlens, {name}", cu, torch.arange(PARTS).repeat_interleave(cu.diff())


def packed(
    op: str, attend: Callable, equal: Callable, seen: Callable, heads: int, n: int
) -> Iterator[Case]:
    """equal: the op for the dense batch."""
    x, i = leaves(*[(1, heads, n, WIDTH)] * 3), torch.arange(n)
    dense = Call(equal, leaves(*[(PARTS, heads, n // PARTS, WIDTH)] * 3))
    for name, cu, document in packings(n):
        start = cu[document]

        def within(b, h, i, j, start=start):
            return seen(b, h, i - start[i], j - start[j]) & (start[i] == start[j])

        yield Case(
            op, name, Call(partial(attend, cu_seqlens=cu), x), dense,
            Call(by_flex(within, n), x), Call(by_sdpa(within(0, 0, i[:, None], i)), x),
        )  # fmt: skip


def crossed(op: str, attend: Callable, plain: Callable, seen: Callable, heads: int, n: int) -> Case:
    """The last n of 2n tokens ask: they see as many keys as in the op without."""

    def last(b, h, i, j):
        return seen(b, h, i + n, j)

    x = leaves((1, heads, n, WIDTH), *[(1, heads, 2 * n, WIDTH)] * 2)
    i, j = torch.arange(n), torch.arange(2 * n)
    return Case(
        op, "cross-attention, N and 2N", Call(attend, x),
        Call(plain, leaves(*[(1, heads, n, WIDTH)] * 3)),
        Call(by_flex(last, n, keys=2 * n), x), Call(by_sdpa(last(0, 0, i[:, None], j)), x),
    )  # fmt: skip


# --- the others -----------------------------------------------------------------------------------


def sums(op: str, attend: Callable, causal: bool, heads: int, n: int) -> Iterator[Case]:
    """linear attention and performer, which no function of PyTorch computes."""
    q, k, v = leaves(*[(1, heads, n, WIDTH)] * 3)
    plain = Call(attend, [q, k, v])
    few = [q, *leaves(*[(1, heads // 4, n, WIDTH)] * 2)]
    yield Case(op, "grouped heads, H_kv = H/4", Call(attend, few), plain)
    i = torch.arange(n)
    for name, real in (("all real", i >= 0), ("half padding", i < n // 2)):
        yield Case(
            op, f"key_mask, {name}", Call(partial(attend, key_mask=real[None]), [q, k, v]), plain
        )
    if not causal:  # as many tokens in all
        crossed = leaves((1, heads, n // 2, WIDTH), *[(1, heads, n + n // 2, WIDTH)] * 2)
        yield Case(op, "cross-attention, N/2 and 3N/2", Call(attend, crossed), plain)
    equal = Call(attend, leaves(*[(PARTS, heads, n // PARTS, WIDTH)] * 3))
    for name, cu, _ in packings(n):
        yield Case(op, name, Call(partial(attend, cu_seqlens=cu), [q, k, v]), equal)


def decays(heads: int, n: int) -> Iterator[Case]:
    """The op without a decay is causal linear attention of the same features; grouped heads are
    held to the op with a decay of each token."""
    x = leaves(*[(1, heads, n, WIDTH)] * 3)
    plain = partial(tab.linear_attention, feature_map="identity", causal=True)
    rates = (1 - 2.0 ** (-5 - torch.arange(heads))).log()
    for name, decay in (("a head", rates), ("a token", rates[None, :, None].expand(1, heads, n))):
        gated = partial(tab.gated_linear_attention, log_decay=decay.contiguous())
        yield Case("gated_linear", f"decay of {name}", Call(gated, x), Call(plain, x))
    few = [x[0], *leaves(*[(1, heads // 4, n, WIDTH)] * 2)]
    shared = partial(tab.gated_linear_attention, log_decay=decay[:, : heads // 4].contiguous())
    yield Case("gated_linear", "grouped heads, H_kv = H/4", Call(shared, few), Call(gated, x))


def latent(heads: int, n: int) -> Iterator[Case]:
    """SDPA and FlexAttention on the keys and values of every head, written for the call."""

    def operands(b: int, n: int) -> list[Tensor]:
        first = (b, heads, n, WIDTH), (b, heads, n, ROTARY), (b, n, LATENT), (b, n, ROTARY)
        return leaves(*first, (heads, WIDTH, LATENT), (heads, WIDTH, LATENT))

    def expanded(attend: Callable) -> Callable:
        def function(q, q_rope, c, k_rope, w_uk, w_uv):
            k = torch.einsum("bnr,hdr->bhnd", c, w_uk)
            v = torch.einsum("bnr,hdr->bhnd", c, w_uv)
            k = torch.cat([k, k_rope[:, None].expand(-1, heads, -1, -1)], -1)
            return attend(torch.cat([q, q_rope], -1), k, v)

        return function

    def causal(b, h, i, j):
        return j <= i

    def within(document: Tensor, b, h, i, j):
        return (j <= i) & (document[i] == document[j])

    def padded(b, h, i, j):
        return (j <= i) & real[j]

    attend = partial(tab.mla_attention, causal=True, form="fused")
    x, i = operands(1, n), torch.arange(n)
    real, sinks = i < n // 2, torch.linspace(-1, 1, heads)
    slopes = 2.0 ** -torch.arange(1.0, heads + 1)
    plain, equal = Call(attend, x), Call(attend, operands(PARTS, n // PARTS))
    square = i[:, None], i
    flex = by_flex(causal, n)
    sdpa = partial(F.scaled_dot_product_attention, is_causal=True)
    rows: dict[str, tuple] = {
        NOTHING: ({}, plain, flex, sdpa),
        "key_mask, all real": ({"key_mask": (i >= 0)[None]}, plain, flex, sdpa),
        "key_mask, half padding": (
            {"key_mask": real[None]}, plain, by_flex(padded, n), by_sdpa(padded(0, 0, *square)),
        ),
        "softcap": ({"softcap": 30.0}, plain, by_flex(causal, n, capped), None),
        "alibi": (
            {"alibi": slopes}, plain, by_flex(causal, n, sloped(slopes)),
            by_sdpa(falling(slopes, causal(0, 0, *square))),
        ),
        "sinks": ({"sinks": sinks}, plain, None, None),
        "return_lse": ({"return_lse": True}, plain, None, None),
    }  # fmt: skip
    for name, cu, document in packings(n):
        mask = partial(within, document)
        rows[name] = {"cu_seqlens": cu}, equal, by_flex(mask, n), by_sdpa(mask(0, 0, *square))
    for feature, (options, without, other, theirs) in rows.items():
        yield Case(
            "mla", feature, Call(partial(attend, **options), x), without,
            other and Call(expanded(other), x), theirs and Call(expanded(theirs), x),
        )  # fmt: skip


def cases(heads: int, n: int) -> Iterator[Case]:
    w = tab.orthogonal_projection(128, WIDTH, generator=torch.Generator().manual_seed(0))
    yield from sums("linear", tab.linear_attention, False, heads, n)
    yield from sums("linear, causal", partial(tab.linear_attention, causal=True), True, heads, n)
    performer = partial(tab.performer_attention, projection=w)
    yield from sums("performer", performer, False, heads, n)
    yield from sums("performer, causal", partial(performer, causal=True), True, heads, n)
    yield from decays(heads, n)

    def near(b, h, i, j):
        return (j <= i) & (i - j <= WINDOW)

    def blocks(b, h, i, j):
        row, column = i // BLOCK, j // BLOCK
        return (j <= i) & ((row - column < 4) | (column < 1))

    @functools.cache
    def pattern(n: int) -> tab.BlockPattern:
        return tab.BlockPattern.sliding_window(n, window=4, sinks=1, block_size=BLOCK)

    def of(pattern: tab.BlockPattern | Callable) -> Callable:
        return partial(tab.sparse_attention, pattern=pattern, causal=True)

    local, sparse = partial(tab.local_attention, window=WINDOW, causal=True), of(pattern(n))
    yield from softmax("local", local, near, heads, n)
    yield crossed("local", local, local, near, heads, n)
    yield from packed("local", local, local, near, heads, n)
    yield from softmax("sparse", sparse, blocks, heads, n)
    yield crossed("sparse", of(pattern(2 * n).tail(n)), sparse, blocks, heads, n)
    yield from packed("sparse", of(pattern), of(pattern(n // PARTS)), blocks, heads, n)
    yield from latent(heads, n)
