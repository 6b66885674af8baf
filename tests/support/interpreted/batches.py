"""The Triton kernel of batch assembly, run by Triton's interpreter on CPU tensors.

tests/ops/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import pytest
import torch
from interpreter import interpreted
from proof import poisoned

from tab.data.host import assemble_host

(assemble,) = interpreted("assemble")

MEAN, SCALE = torch.tensor([125.3, 122.9, 113.9]), 1 / torch.tensor([62.5, 61.9, 66.5])


@pytest.mark.parametrize("height, width", [(1, 1), (5, 7), (32, 32), (20, 33)])
def test_the_bits_of_the_host(height, width, generator):
    """Every move at its extremes, and none; images twice and in any order."""
    images = torch.randint(256, (4, height, width, 3), generator=generator, dtype=torch.uint8)
    y, x = sorted({1 - height, 0, height - 1}), sorted({1 - width, -1 % width, 0, width - 1})
    moves = [(dy, dx, mirror) for dy in y for dx in x for mirror in (0, 1)]
    moves = torch.tensor(moves, dtype=torch.int8)
    index = torch.randint(4, (len(moves),), generator=generator)
    with poisoned():
        given = assemble(images, index, moves, MEAN, SCALE)
    wanted = assemble_host(images, index, moves, MEAN, SCALE, 1)
    assert torch.equal(given, wanted) and given.stride() == wanted.stride()


def test_strides_and_nothing():
    images = torch.arange(4 * 6 * 6 * 3, dtype=torch.uint8).view(4, 6, 6, 3)
    index, moves = torch.tensor([3, 0, 1, 2]), torch.ones(4, 3, dtype=torch.int8)
    strided = [images[:, ::2], torch.stack([index, index], 1)[:, 0], moves.T.contiguous().T]
    plain = [x.contiguous() for x in strided]
    assert torch.equal(*(assemble(*x, MEAN, SCALE) for x in (strided, plain)))
    assert assemble(images, index[:0], moves[:0], MEAN, SCALE).shape == (0, 3, 6, 6)
