"""BlockPattern to FlexAttention's BlockMask and back; what a pattern cannot express is refused."""

import pytest
import torch
from textbook.softmax import draw
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tab import BlockPattern, sparse_attention


def flex_mask(mask_mod, n, size, b=None, h=None, keys=None):
    return create_block_mask(mask_mod, b, h, n, keys or n, device="cpu", BLOCK_SIZE=size)


def same(a: BlockPattern, b: BlockPattern) -> bool:
    own = (a.n, a.n_keys, a.block_size, a.heads) == (b.n, b.n_keys, b.block_size, b.heads)
    return own and all(map(torch.equal, a.tensors, b.tensors))


PATTERNS = [
    BlockPattern.bigbird(64, heads=2, block_size=8, num_random=1),
    BlockPattern.bigbird(61, heads=2, block_size=8, num_random=1),  # the last block is shorter
    BlockPattern.sliding_window(45, window=2, sinks=1, block_size=4),
    BlockPattern.strided(13, stride=4, block_size=1),
    BlockPattern.from_blocks(torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]]).bool(), 5, 13),
    BlockPattern.sliding_window(45, window=2, sinks=1, block_size=4).tail(13),
    BlockPattern.from_blocks(
        torch.tensor([[1, 0, 1, 0, 1], [1, 1, 0, 1, 1]]).bool(), 5, 8, n_keys=22
    ),
    BlockPattern.from_blocks(torch.tensor([[1, 0], [1, 1], [1, 1]]).bool(), 5, 12, n_keys=7),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_round_trip(pattern):
    assert same(BlockPattern.from_block_mask(pattern.to_block_mask()), pattern)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_round_trip_causal(pattern):
    """What lies after the diagonal is not in the mask."""
    n, m, size = pattern.n, pattern.n_keys, pattern.block_size
    pairs = torch.ones(n, m).tril(m - n)
    blocks = pattern.to_blocks() & F.max_pool2d(pairs[None], size, ceil_mode=True).bool()
    blocks = blocks if pattern.heads else blocks[0]
    earlier = BlockPattern.from_blocks(blocks, size, n, n_keys=m)
    mask = pattern.to_block_mask(causal=True)
    assert same(BlockPattern.from_block_mask(mask, causal=True), earlier)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("causal", [False, True])
def test_the_mask_that_flex_attention_would_make(pattern, causal):
    dense = pattern.to_dense()
    n, m, size, hp = pattern.n, pattern.n_keys, pattern.block_size, len(dense)
    dense = dense.tril(m - n) if causal else dense
    made = flex_mask(lambda b, h, i, j: dense[h, i, j], n, size, 1, hp, keys=m)
    given = pattern.to_block_mask(causal=causal)
    assert given.seq_lengths == made.seq_lengths and given.BLOCK_SIZE == made.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(given, f"{kind}_num_blocks"), getattr(made, f"{kind}_num_blocks")
        assert torch.equal(*counts), kind
        index = getattr(given, f"{kind}_indices"), getattr(made, f"{kind}_indices")
        listed = torch.arange(index[0].shape[-1]) < counts[0][..., None]
        assert torch.equal(*(x[listed] for x in index)), kind


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [False, True])
def test_flex_attention_computes_the_same(causal):
    """Its gradients it has on CUDA alone; those of ours are held against masked SDPA's."""
    pattern, inputs = PATTERNS[1], draw(2, 2, 61, 8)
    flex = flex_attention(*inputs, block_mask=pattern.to_block_mask(causal=causal))
    torch.testing.assert_close(sparse_attention(*inputs, pattern, causal=causal), flex)


def causal_rule(b, h, i, j):
    return j <= i


DOCUMENT = torch.arange(61) // 16


@pytest.mark.parametrize(
    ("mask_mod", "causal", "dense"),
    [
        (lambda b, h, i, j: DOCUMENT[i] == DOCUMENT[j], False, DOCUMENT[:, None] == DOCUMENT),
        (causal_rule, True, torch.ones(61, 61).tril().bool()),
        (lambda b, h, i, j: (j <= i) & (DOCUMENT[i] == DOCUMENT[j]), True,
         (DOCUMENT[:, None] == DOCUMENT).tril()),
    ],
    ids=["documents", "causal", "causal documents"],
)  # fmt: skip
def test_masks_of_others(mask_mod, causal, dense):
    pattern = BlockPattern.from_block_mask(flex_mask(mask_mod, 61, 8), causal=causal)
    given = pattern.to_dense()[0]
    assert torch.equal(given.tril() if causal else given, dense)


def test_a_mask_without_full_blocks():
    both = create_block_mask(causal_rule, None, None, 32, 32, "cpu", 8)
    counts = both.kv_num_blocks + both.full_kv_num_blocks
    order = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4).contiguous()  # causal: the first
    mask = BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=8, mask_mod=causal_rule)
    assert mask.full_kv_num_blocks is None
    pattern = BlockPattern.from_block_mask(mask, causal=True)
    assert torch.equal(pattern.to_blocks()[0], torch.ones(4, 4).tril().bool())


def test_heads_and_batch():
    def by_head(b, h, i, j):
        return i // 4 == (j // 4 + h) % 4

    pattern = BlockPattern.from_block_mask(flex_mask(by_head, 16, 4, 2, 3))
    assert pattern.heads == 3
    assert torch.equal(
        pattern.to_blocks(), torch.stack([torch.eye(4).roll(h, 0) for h in range(3)]) > 0
    )
    with pytest.raises(ValueError, match="different blocks for its 2 batch entries: make one"):
        BlockPattern.from_block_mask(flex_mask(lambda b, h, i, j: by_head(h, b, i, j), 16, 4, 2, 1))


@pytest.mark.parametrize(
    ("mask", "causal", "message"),
    [
        (lambda: flex_mask(causal_rule, 32, 8), False,
         r"block \(0, 0\) of head 0 .* query 0 does not see key 1, .*pass causal=True"),
        (lambda: flex_mask(lambda b, h, i, j: i - j < 3, 32, 8), False,
         r"block \(0, 0\) .*query 3 does not see key 0, other .* smaller BLOCK_SIZE"),
        (lambda: flex_mask(lambda b, h, i, j: abs(i - j) < 3, 32, 8), True,
         r"query 0 sees key 1, other pairs of the block are hidden; a BlockMask of smaller"),
        (lambda: flex_mask(lambda b, h, i, j: abs(i - j) < 2, 4, 1), True,
         r"shows block row 0 of head 0 all of block 1, .* causal=True hides; leave causal out"),
        (lambda: flex_mask(lambda b, h, i, j: i >= 0, 32, 8), True,
         r"block row 0 of head 0 all of block 0, .* leave causal out"),
        (lambda: flex_mask(causal_rule, 32, (8, 16)), True, "blocks of 8 × 16"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed(mask, causal, message):
    with pytest.raises(ValueError, match=message):
        BlockPattern.from_block_mask(mask(), causal=causal)
