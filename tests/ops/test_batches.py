"""Batch assembly: C++ and torch against a plain numpy version, and what may not change a draw."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tab.data import host
from tab.data.batches import Batches
from tab.data.host import assemble_host
from tab.data.load import Split
from tab.ops.batches import assemble

MASK = 2**64 - 1
MEAN, STD = torch.tensor([125.3, 122.9, 113.9]).double(), torch.tensor([62.5, 61.9, 66.5]).double()


def split(count: int, height: int = 32, width: int = 32) -> Split:
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, height, width, 3), np.uint8)
    return Split(torch.from_numpy(images), torch.arange(count))


def mix(x: int) -> int:
    """SplitMix64, in Python's unbounded integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_moves(seed: int, epoch: int, index, translate: int, flip: bool) -> list[tuple]:
    span, out = 2 * translate + 1, []
    for i in index:
        dice = mix(mix(mix(mix(seed) ^ epoch)) ^ i)
        dy, dx = (dice >> 32) * span >> 32, ((dice >> 1) % 2**31) * span >> 31
        out.append((dy - translate, dx - translate, int(flip and dice & 1)))
    return out


def slow_image(image: np.ndarray, dy: int, dx: int, mirror: int, mean, std) -> np.ndarray:
    """One pixel at a time, in float64; uncovered pixels are 0."""
    height, width, _ = image.shape
    out = np.zeros((height, width, 3))
    for y in range(height):
        for x in range(width):
            if 0 <= y - dy < height and 0 <= x - dx < width:
                out[y, x] = (image[y - dy, x - dx] - mean) / std
    return out[:, ::-1] if mirror else out


def either_way():
    """Once with the extension, once without it."""
    built = host._host
    assert built, "tab._host is not built"
    try:
        for host._host in (built, None):
            yield
    finally:
        host._host = built


@given(
    st.integers(0, MASK),
    st.integers(0, 2**40),
    st.lists(st.integers(0, 2**40), max_size=20),
    st.integers(0, 127),
    st.booleans(),
)
def test_moves_follow_the_formula(seed, epoch, index, translate, flip):
    index = torch.tensor(index, dtype=torch.int64)
    wanted = slow_moves(seed, epoch, index.tolist(), translate, flip)
    for _ in either_way():
        found = host.moves(seed, epoch, index, translate, flip)
        assert list(map(tuple, found.tolist())) == wanted


@given(st.integers(0, MASK), st.integers(0, MASK))
def test_hash_follows_the_formula(seed, epoch):
    for _ in either_way():
        assert host.hash(seed, epoch) == mix(mix(seed) ^ epoch)


@settings(max_examples=40)
@given(
    st.integers(1, 9), st.integers(1, 17), st.integers(1, 17), st.integers(0, 16), st.integers(1, 3)
)
def test_assembly_is_the_formula(count, height, width, translate, threads):
    data = split(count, height, width)
    translate = min(translate, height - 1, width - 1)
    index = torch.randint(count, (13,), generator=torch.Generator().manual_seed(height))
    moves = host.moves(7, width, index, translate, True)
    truth = np.stack(
        [
            slow_image(data.images[i].numpy(), *move, MEAN.numpy(), STD.numpy())
            for i, move in zip(index.tolist(), moves.tolist(), strict=True)
        ]
    )
    scale = 1 / STD
    arguments = (data.images, index, moves, MEAN.float(), scale.float())
    device = assemble("reference", *arguments)
    for _ in either_way():
        found = assemble_host(*arguments, threads)
        np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), truth, rtol=1e-6, atol=1e-6)
        assert torch.equal(found, device)


def test_every_move_at_the_extremes():
    data = split(2, 5, 6)
    extremes = [(dy, dx, m) for dy in (-4, 0, 4) for dx in (-4, -1, 0, 1, 4) for m in (0, 1)]
    moves = torch.tensor(extremes, dtype=torch.int8)
    index = torch.arange(len(extremes)) % 2
    found = assemble_host(data.images, index, moves, torch.zeros(3), torch.ones(3), 2)
    for i, move in enumerate(extremes):
        truth = slow_image(data.images[i % 2].numpy(), *move, 0, 1)
        np.testing.assert_array_equal(found[i].permute(1, 2, 0).numpy(), truth)


def test_layout_and_lengths():
    loader = Batches(split(130), batch_size=64, mean=MEAN, std=STD)
    shapes = [(tuple(x.shape), tuple(y.shape)) for x, y in loader.epoch(0)]
    assert shapes == [((b, 3, 32, 32), (b,)) for b in (64, 64, 2)]
    assert len(loader) == 3 and loader.samples == 130
    x, y = next(loader.epoch(0))
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == torch.int64 and y.tolist() == list(range(64))
    dropped = Batches(split(130), batch_size=64, mean=MEAN, std=STD, drop_last=True)
    assert len(dropped) == 2 and dropped.samples == 128
    assert sum(len(y) for _, y in dropped.epoch(0)) == 128


def epoch(epoch: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"shuffle": True, "translate": 4, "flip": True, "batch_size": 100, **options}
    loader = Batches(split(300), mean=MEAN, std=STD, **options)
    x, y = zip(*loader.epoch(epoch), strict=True)
    return torch.cat(x), torch.cat(y)


def test_an_epoch_is_a_function_of_seed_and_epoch_alone():
    x, y = epoch(3, seed=5)
    assert sorted(y.tolist()) == list(range(300))
    for other in ({"threads": 1}, {"threads": 5}, {"batch_size": 299}, {"batch_size": 1}):
        x2, y2 = epoch(3, seed=5, **other)
        assert torch.equal(x, x2) and torch.equal(y, y2)
    torch.manual_seed(99)  # the global state has no say
    assert torch.equal(epoch(3, seed=5)[0], x)
    for other in (epoch(4, seed=5), epoch(3, seed=6)):
        assert not torch.equal(other[1], y)
        # Not only the order is new, the moves are too.
        assert not torch.equal(other[0][other[1].argsort()], x[y.argsort()])
    # In order of the images, the moves are the same with and without shuffling.
    assert torch.equal(epoch(3, seed=5, shuffle=False)[0], x[y.argsort()])


def test_epoch_draws_nothing_from_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epoch(0)
    assert torch.equal(before, torch.get_rng_state())


def test_moves_are_fair():
    moves = host.moves(0, 0, torch.arange(90_000), 4, True).long()
    for column in (0, 1):
        counts = torch.bincount(moves[:, column] + 4, minlength=9)
        assert (counts - 10_000).abs().max() < 500  # 5 standard deviations
    assert abs(int(moves[:, 2].sum()) - 45_000) < 750
    assert abs(np.corrcoef(moves.T.numpy())[np.triu_indices(3, 1)]).max() < 0.02
    still = host.moves(0, 0, torch.arange(1000), 0, False)
    assert not still.any()


def test_index_takes_a_part():
    index = torch.tensor([7, 3, 250])
    x, y = epoch(0, index=index, shuffle=False, batch_size=2)
    assert y.tolist() == [7, 3, 250]
    assert torch.equal(x, epoch(0, shuffle=False)[0][index])


def test_strided_images_are_taken():
    data = split(40)
    every_other = Split(data.images[::2], data.labels[::2])
    x, _ = next(Batches(every_other, batch_size=20, mean=MEAN, std=STD).epoch(0))
    y, _ = next(Batches(data, batch_size=40, mean=MEAN, std=STD).epoch(0))
    assert torch.equal(x, y[::2])


def test_normalised_with_its_own_statistics():
    from tab.data.statistics import statistics

    data = split(200)
    mean, std = statistics(data.images)
    x, _ = next(Batches(data, batch_size=200, mean=mean, std=std).epoch(0))
    assert x.double().mean((0, 2, 3)).abs().max() < 1e-6
    assert (x.double().std((0, 2, 3), correction=0) - 1).abs().max() < 1e-6


def test_opcheck():
    images = split(3).images
    moves = torch.ones(2, 3, dtype=torch.int8)
    arguments = images, torch.tensor([2, 0]), moves, MEAN.float(), STD.float()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(assemble.overload, arguments, test_utils=tests)


@pytest.mark.gpu
def test_cuda_gives_the_same_bits():
    assert assemble.why_not("triton") is None, assemble.why_not("triton")
    for on_host, on_gpu in zip(epoch(2), epoch(2, device="cuda"), strict=True):
        assert on_gpu.is_cuda and torch.equal(on_host, on_gpu.cpu())


@pytest.mark.parametrize(
    "options, said",
    [
        ({"batch_size": 0}, "batch_size 0 must be 1 or more"),
        ({"translate": -1}, "translate -1 must be 0…31"),
        ({"translate": 32}, "translate 32 must be 0…31"),
        ({"threads": 0}, "threads 0 must be 1 or more"),
        ({"drop_last": True, "batch_size": 301}, "batch_size of at most 300"),
        ({"index": torch.tensor([], dtype=torch.int64)}, "no batch: 0 images"),
        ({"index": torch.tensor([0, 300])}, "from 0 to 300, but the images are numbered 0…299"),
        ({"index": torch.tensor([-1])}, "from -1 to -1"),
        ({"index": torch.ones(300, dtype=torch.bool)}, "mask.nonzero"),
        ({"std": torch.tensor([1.0, 0.0, 1.0])}, "above 0"),
        ({"mean": torch.zeros(1)}, r"must be \(3,\)"),
    ],
)
def test_bad_options_are_named(options, said):
    options = {"batch_size": 10, "mean": MEAN, "std": STD, **options}
    with pytest.raises(ValueError, match=said):
        Batches(split(300), **options)


def test_bad_epoch_is_named():
    with pytest.raises(ValueError, match="epoch -1"):
        epoch(-1)


def test_the_extension_guards_its_memory():
    images, moves = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((1, 3), np.int8)
    ones, out = np.ones(3, np.float32), np.empty((1, 4, 4, 3), np.float32)
    index = np.zeros(1, np.int64)
    for bad in (np.array([2]), np.array([-1])):
        with pytest.raises(ValueError, match="is not in 0…1"):
            host._host.assemble(images, bad, moves, ones, ones, out, 1)
    with pytest.raises(ValueError, match="as large as the image"):
        host._host.assemble(images, index, moves + np.int8(4), ones, ones, out, 1)
    with pytest.raises(ValueError, match="out must be"):
        host._host.assemble(images, index, moves, ones, ones, out[:, :3].copy(), 1)
    with pytest.raises(TypeError):
        host._host.assemble(images, index, moves, ones, ones, out.astype(np.float64), 1)
    with pytest.raises(ValueError):  # not contiguous: a copy would be written and lost
        host._host.assemble(images, index, moves, ones, ones, out.transpose(0, 2, 1, 3), 1)


def test_the_same_batches_without_the_extension():
    options = {"batch_size": 7, "mean": MEAN, "std": STD, "seed": 3, "shuffle": True}
    options |= {"translate": 4, "flip": True}
    with_it, without = ([*Batches(split(30), **options).epoch(2)] for _ in either_way())
    for (x, y), (other, label) in zip(with_it, without, strict=True):
        assert torch.equal(x, other) and torch.equal(y, label)
