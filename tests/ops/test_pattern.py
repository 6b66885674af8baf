"""BlockPattern: BigBird row by row, compressed rows and columns, its own seed."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tab import BlockPattern


@settings(max_examples=40)
@given(
    n=st.integers(1, 200), block_size=st.integers(1, 70), heads=st.integers(1, 4),
    window=st.sampled_from([1, 3, 5]), num_global=st.integers(0, 3), num_random=st.integers(0, 5),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_bigbird_row_by_row(n, block_size, heads, window, num_global, num_random, seed):
    pattern = BlockPattern.bigbird(
        n, heads=heads, block_size=block_size, window=window, num_global=num_global,
        num_random=num_random, seed=seed,
    )  # fmt: skip
    nb = -(-n // block_size)
    ends = {i for i in range(nb) if min(i, nb - 1 - i) < num_global}
    for mask in pattern.to_blocks():
        for i, row in enumerate(mask):
            seen = set(row.nonzero().flatten().tolist())
            fixed = ends | {j for j in range(nb) if abs(i - j) <= window // 2}
            if i in ends:
                assert len(seen) == nb
            else:
                assert fixed <= seen
                assert len(seen) == min(nb, len(fixed) + num_random)
    hp = len(pattern.to_blocks())
    assert pattern.heads == heads and hp in (1, heads)
    assert pattern.density == pytest.approx(pattern.to_blocks().double().mean().item())


def test_random_blocks_are_uniform():
    """Row 10 of 40 draws 3 of 35: each of them in 3/35 of 2000 heads, within five deviations."""
    blocks = BlockPattern.bigbird(40, heads=2000, block_size=1).to_blocks()[:, 10].double()
    drawn = [j for j in range(1, 39) if not 9 <= j <= 11]
    p = 3 / 35
    assert len(drawn) == 35
    assert (blocks[:, drawn].mean(0) - p).abs().max() < 5 * (p * (1 - p) / 2000) ** 0.5


def test_draw_has_its_own_seed():
    options = {"heads": 3, "block_size": 4}
    before = torch.get_rng_state()
    a, b = (BlockPattern.bigbird(150, seed=1, **options) for _ in range(2))
    c = BlockPattern.bigbird(150, seed=2, **options)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a.col, b.col) and not torch.equal(a.col, c.col)
    heads = a.to_blocks()
    assert not torch.equal(heads[0], heads[1])


@settings(max_examples=40)
@given(
    heads=st.integers(0, 3), nb=st.integers(1, 9), block_size=st.integers(1, 5),
    p=st.floats(0, 1), seed=st.integers(0, 9),
)  # fmt: skip
def test_compressed_rows_and_columns(heads, nb, block_size, p, seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(*((heads,) if heads else ()), nb, nb, generator=g) < p
    n = nb * block_size - int(torch.randint(block_size, (), generator=g))
    pattern = BlockPattern.from_blocks(mask, block_size, n)
    full = mask.view(-1, nb, nb)
    assert all(x.dtype == torch.int32 for x in pattern.tensors)
    assert torch.equal(pattern.to_blocks(), full)
    for ptr, index, dense in (
        (pattern.row_ptr, pattern.col, full), (pattern.col_ptr, pattern.row, full.mT)
    ):  # fmt: skip
        for h in range(len(full)):
            for i in range(nb):
                listed = index[ptr[h, i] : ptr[h, i + 1]]
                assert torch.equal(listed.long(), dense[h, i].nonzero().flatten())
    dense = full.repeat_interleave(block_size, 1).repeat_interleave(block_size, 2)
    assert torch.equal(pattern.to_dense(), dense[:, :n, :n])


def test_pattern_is_small_immutable_and_moves_once():
    pattern = BlockPattern.bigbird(200_000, heads=2)
    assert pattern.col.numel() < 2 * 3125 * 13  # a dense mask of blocks has 3125² a head
    with pytest.raises(AttributeError):
        pattern.n = 3
    moved = pattern.to("meta")
    assert moved is pattern.to(torch.device("meta")) and moved.row.is_meta
    assert moved.to("cpu") is pattern
    assert torch.equal(copy.deepcopy(pattern).col, pattern.col)
    assert repr(pattern) == (
        f"BlockPattern(n=200000, block_size=64, heads=2, density={pattern.density:.3f})"
    )


def test_saved_and_copied_without_what_lies_on_other_devices():
    pattern = BlockPattern.bigbird(64, heads=2, block_size=8)
    pattern.to("meta")
    file = io.BytesIO()
    torch.save({"pattern": pattern}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["pattern"]
    for copied in (loaded, pickle.loads(pickle.dumps(pattern)), copy.deepcopy(pattern)):
        assert repr(copied) == repr(pattern)
        for x, y in zip(copied.tensors, pattern.tensors, strict=True):
            assert torch.equal(x, y)
            assert x.data_ptr() != y.data_ptr()
        assert copied.to("cpu") is copied
        assert copied._copies.keys() == {"cpu"}


def test_no_tokens():
    for pattern in (
        BlockPattern.bigbird(0, heads=2, block_size=8),
        BlockPattern.from_blocks(torch.ones(0, 0, dtype=torch.bool), 8, 0),
    ):
        assert pattern.blocks == pattern.density == 0
        assert pattern.to_dense().shape == (1, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 2}, "got 2; nearest: 1 or 3"),
        ({"window": -1}, "got -1; nearest: 1"),
        ({"num_global": -1}, "num_global ≥ 0, got -1"),
        ({"num_random": -2}, "num_random ≥ 0, got -2"),
        ({"heads": 0}, "heads ≥ 1, got 0"),
        ({"block_size": 0}, "block_size ≥ 1; got 64 and 0"),
    ],
)
def test_bad_bigbird(change, message):
    with pytest.raises(ValueError, match=message):
        BlockPattern.bigbird(64, **{"heads": 2, "block_size": 8, **change})


def test_bad_blocks():
    for mask in (torch.ones(3, 3, dtype=torch.bool), torch.ones(4, 4)):
        with pytest.raises(ValueError, match=r"bool mask \(4, 4\) or \(H, 4, 4\), got \("):
            BlockPattern.from_blocks(mask, 16, 64)
