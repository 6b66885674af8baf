"""The layer "local": its attention matrix, key masks, errors."""

import pytest
import torch
from textbook.softmax import in_window

from tab.layers import build_attention


@pytest.mark.parametrize("two_dimensional", [False, True])
def test_layer_is_its_attention_matrix(two_dimensional, generator):
    layer = build_attention("local", 12, seq_len=30, grid=(5, 6), num_heads=3, window_size=4,
                            two_dimensional=two_dimensional)  # fmt: skip
    x = torch.randn(2, 30, 12, generator=generator)
    matrix = layer.attention_matrix(x)  # (B, H, N, N)
    assert torch.equal(matrix[0, 0] > 0, in_window(30, 2, 2, cols=6 * two_dimensional))
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 3, 30))
    _, _, v = layer.project(x)
    torch.testing.assert_close(layer(x), layer.out((matrix @ v).transpose(1, 2).flatten(2)))


def test_layer_obeys_a_key_mask(generator):
    """Padding is invisible: the real tokens come out as if they were alone."""
    layer = build_attention("local", 8, seq_len=20, num_heads=2, window_size=6)
    x = torch.randn(2, 20, 8, generator=generator, requires_grad=True)
    mask = torch.arange(20).expand(2, 20) < 13
    out = layer(x, mask)
    torch.testing.assert_close(out[:, :13], layer(x[:, :13]))
    assert not out[:, 13:].any()
    (grad,) = torch.autograd.grad(out[:, :13].sum(), x)
    assert grad[:, 13:].abs().max() == 0


def test_layer_errors():
    with pytest.raises(ValueError, match="window_size=-1 must be ≥ 0"):
        build_attention("local", 8, seq_len=4, window_size=-1)
    with pytest.raises(ValueError, match="two_dimensional=True needs tokens on a grid"):
        build_attention("local", 8, seq_len=4, two_dimensional=True)
