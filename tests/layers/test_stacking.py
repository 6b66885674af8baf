"""What a layer says of itself: its title, its colour, and how several seeds of it run as one."""

import pytest
import torch
from torch import nn

from tab.layers import Attention, build_attention, control_names, get_attention, stacks
from tab.layers._base import NOT_SAID
from tab.models.stacked import PerSeed, stack

B, N, C = 3, 16, 8


class Doubled(Attention):
    """y = 2 · Linear(x): nothing of its own, images treated alike."""

    stacking = True

    def __init__(self, dim, *, seq_len, grid=None):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def compute(self, x, key_mask):
        return 2 * self.linear(x)


class Scaled(Attention):
    """y = s ⊙ x"""

    def __init__(self, dim, *, seq_len, grid=None):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(dim))

    def compute(self, x, key_mask):
        return self.scale * x


def two(kind):
    return [kind(C, seq_len=N) for _ in "ab"]


def check(layers):
    """Outputs and gradients of the stacked layer are those of each by itself."""
    one = stack(layers)
    one.eval()
    x = torch.randn(2 * B, N, C, requires_grad=True)
    truth = torch.cat([layer(part) for layer, part in zip(layers, x.chunk(2), strict=True)])
    weight = torch.randn_like(truth)
    parameters = [p for layer in layers for p in layer.parameters()]
    wanted = torch.autograd.grad((truth * weight).sum(), [x, *parameters])
    y = one(x)
    leaves = list(one.parameters())
    given = torch.autograd.grad((y * weight).sum(), [x, *leaves])
    torch.testing.assert_close(y, truth)
    torch.testing.assert_close(given[0], wanted[0])
    homes = dict(zip(parameters, wanted[1:], strict=True))
    for leaf, gradient in zip(leaves, given[1:], strict=True):
        for part, own in enumerate(getattr(leaf, "seeds", (leaf,))):
            found = gradient[part] if hasattr(leaf, "seeds") else gradient
            torch.testing.assert_close(found, homes[own], atol=1e-5, rtol=1e-4)
    return one


def why(module):
    return [each.why for each in module.modules() if isinstance(each, PerSeed)]


@pytest.mark.parametrize("grid", [None, (4, 4)], ids=["line", "grid"])
@pytest.mark.parametrize("name", control_names())
def test_controls_run_as_one_or_say_why_not(name, grid):
    given = [{"seed": s} if name == "random" else {} for s in range(2)]  # each an M of its own
    layers = [build_attention(name, C, seq_len=N, grid=grid, **options) for options in given]
    assert why(check(layers)) == (["its convolution is written for one seed"] * (name == "dwconv"))


def test_a_layer_of_others_may_say_that_it_runs_unchanged():
    assert not why(check(two(Doubled)))


def test_a_layer_of_others_may_bring_its_stacked_form():
    layers = two(type("Own", (Scaled,), {}))

    @stacks(type(layers[0]))
    class Stacked(type(layers[0])):
        def compute(self, x, key_mask):
            return (self.scale[:, None, None] * x.unflatten(0, (2, -1))).flatten(0, 1)

    assert not why(check(layers))


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({}, NOT_SAID),
        ({"stacking": "it draws"}, "it draws"),
        ({"stacking": True}, "weights of its own, and no class that stacks them"),
    ],
)
def test_what_cannot_be_stacked_says_why(attributes, words):
    (said,) = why(check(two(type("Own", (Scaled,), attributes))))
    assert words in said


def test_seeds_whose_buffers_differ_run_one_by_one():
    layers = two(Doubled)
    for number, layer in enumerate(layers):
        layer.register_buffer("number", torch.tensor(number))
    assert why(stack(layers)) == ["its buffers are not the same for all seeds"]


def test_a_convolution_in_a_layer_is_not_mistaken_for_a_folded_one():
    """As many groups as seeds: within a backbone, seeds lie beside each other in the channels."""

    class Convolved(Doubled):
        stacking = True

        def __init__(self, dim, *, seq_len, grid=None):
            super().__init__(dim, seq_len=seq_len)
            self.linear = nn.Conv2d(1, 1, 3, padding=1)

        def compute(self, x, key_mask):
            return self.linear(x[:, None])[:, 0]

    check(two(Convolved))


def test_a_stacked_form_is_a_subclass():
    with pytest.raises(TypeError, match="must be a subclass of Doubled"):
        stacks(Doubled)(Scaled)


def test_a_subclass_is_another_mechanism():
    """It inherits neither title nor colour, nor what its base says of images: what it adds may
    treat them otherwise."""
    kind = type("Mine", (get_attention("linear"),), {})
    assert (kind.title, kind.colour, kind.stacking) == ("", None, NOT_SAID)
    named = type("Mine", (get_attention("linear"),), {"title": "Mine", "colour": 12})
    assert (named.title, named.colour) == ("Mine", 12)
