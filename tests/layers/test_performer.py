"""The performer layer: what it computes, and when it draws its features anew."""

import pytest
import torch
from textbook.performer import features
from torch.testing import assert_close

from tab.layers import build_attention


def layer(**options):
    torch.manual_seed(0)
    return build_attention("performer", 24, seq_len=16, num_heads=3, **options)


@pytest.mark.parametrize("kernel", ("softmax", "relu"))
def test_layer(generator, kernel):
    x = torch.randn(2, 16, 24, generator=generator)
    attention = layer(kernel=kernel, num_features=32)
    matrix = attention.attention_matrix(x)
    assert matrix.shape == (2, 3, 16, 16)
    assert_close(matrix.sum(-1), torch.ones(2, 3, 16))
    q, k, v = attention.project(x)
    a = features(q, attention.projection, kernel) @ features(k, attention.projection, kernel).mT
    assert_close(matrix, a / a.sum(-1, keepdim=True))
    assert_close(attention(x), attention.out((matrix @ v).transpose(1, 2).flatten(2)))
    mask = torch.arange(16).expand(2, 16) < 11
    assert_close(attention(x, mask)[:, :11], attention(x[:, :11]))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), attention(x))


def test_redraw():
    attention, fixed = layer(redraw_interval=2), layer()
    assert torch.equal(attention.projection, fixed.projection)
    assert not torch.equal(fixed.projection, layer(seed=1).projection)
    seen = []
    for _ in range(6):
        attention.after_step()
        fixed.after_step()
        seen.append(attention.projection.clone())
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[3], seen[1])
    assert torch.equal(fixed.projection, layer().projection)
    attention.eval()
    for _ in range(3):
        attention.after_step()
    assert torch.equal(attention.projection, seen[-1])


def test_redraw_resumes():
    whole, first = (layer(redraw_interval=2, seed=5) for _ in range(2))
    for _ in range(3):
        whole.after_step(), first.after_step()
    torch.rand(7)  # the global generator plays no part
    second = layer(redraw_interval=2, seed=9)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.projection, whole.projection)
    whole.after_step(), second.after_step()
    assert torch.equal(second.projection, whole.projection)
    assert not torch.equal(second.projection, first.projection)


def test_layer_errors():
    for options, words in (
        ({"num_features": 0}, "at least 1"),
        ({"kernel": "elu"}, "softmax, relu"),
        ({"redraw_interval": -1}, "0 for never"),
    ):
        with pytest.raises(ValueError, match=words):
            layer(**options)
