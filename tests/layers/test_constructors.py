"""Sizes and options outside of their range, of every layer, read off its signature: the error names
the argument and what was given, or the layer runs."""

import inspect
import math
import re
import typing

import pytest
import torch

from tab.layers import Attention, _registry, build_attention, get_attention, layer_names

KINDS = {
    f"{name}{' published' * published}": get_attention(name, published=published)
    for published in (False, True)
    for name in (_registry._published if published else layer_names())
}
WRONG = {int: (-7, 0, 2**63), float: (-1.0, 0.0, math.nan, math.inf, -math.inf)}
WRONG[float] += (1e300, 1e38, 1e30, 1e-30, 1e-45, 1e-300)  # of which float32 makes inf, or 0
GIVEN = {"dim": 32, "seq_len": 16}


def said(kind: type, argument: str, given: object) -> str:
    """Of the error that refuses it; "" where it is taken, and the layer trains."""
    try:
        layer = kind(**{**GIVEN, argument: given})
    except ValueError as error:
        return str(error)
    for _ in range(2):
        y = layer(torch.randn(2, 16, 32, requires_grad=True))
        loss = y.sum() if layer.auxiliary_loss() is None else y.sum() + layer.auxiliary_loss()
        loss.backward()
        layer.after_step()
        values = [y, *layer.parameters(), *(p.grad for p in layer.parameters()), *layer.buffers()]
        assert all(value.isfinite().all() for value in values if value is not None), given
    return ""


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", KINDS)
def test_what_a_layer_cannot_be_built_with_is_named(name):
    kind, hints = KINDS[name], typing.get_type_hints(KINDS[name].__init__)
    for argument in inspect.signature(kind.__init__).parameters:
        of = hints.get(argument)
        choices = {of, *typing.get_args(of)} & set(WRONG)
        for given in WRONG[choices.pop()] if choices else ():
            error = said(kind, argument, given)
            needed = given == 2**63 or argument in ("dim", "seq_len", "num_heads", "inner_dim")
            assert error or not needed, (argument, given)
            shown = re.escape(str(given))
            assert not error or re.search(rf"\b{argument}\b.*{shown}\b", error), error


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("grid", [(0, 16), (-4, -4), (16, -1), (3, 3), (4, 8)], ids=str)
def test_a_grid_has_as_many_cells_as_there_are_tokens(name, grid):
    with pytest.raises(ValueError, match=rf"{KINDS[name].__name__}: grid={re.escape(str(grid))} "):
        KINDS[name](32, seq_len=16, grid=grid)


def test_layers_of_others_have_these_sizes_too():
    class Mine(Attention):
        def __init__(self, dim, *, seq_len, grid=None):
            super().__init__()

    class Bare(Attention):
        pass

    for kind in (Mine, Bare):
        with pytest.raises(ValueError, match=f"^{kind.__qualname__}: dim=-1 must be 1 or more"):
            kind(-1, seq_len=16)
        with pytest.raises(ValueError, match="seq_len=0 must be 1 or more"):
            kind(4, seq_len=0)


def test_two_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=32; nearest"):
        build_attention("linear", 32, seq_len=16, num_heads=5)
    with pytest.raises(ValueError, match="multiple of 2, got 3; change the width, num_heads or ro"):
        build_attention("linear", 12, seq_len=16, rope=True)
    with pytest.raises(ValueError, match="num_heads=3 does not divide dim=1099511627776"):
        build_attention("linear", 2**40, seq_len=16, num_heads=3)  # at once
    with pytest.raises(ValueError, match=r"tau=1e\+300: .* at most 1e\+30"):
        build_attention("kimi_k2", 32, seq_len=16, tau=1e300)
