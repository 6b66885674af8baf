"""What a forward pass is said to cost: by formula, whatever kernel runs, and never 0 in silence."""

import pytest
import torch
from torch import nn
from torch._higher_order_ops.cond import cond_op
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tab.layers import layer_names
from tab.models.flops import flops_on, forward_flops
from tab.models.image_model import build_model
from tab.ops import OPS
from tab.ops._op import Op
from tab.recipe.recipe import load_recipe


def of(attention):
    return forward_flops(build_model(load_recipe("quick").run_config("cnn", attention, 0), 10))


def test_experts_count(monkeypatch):
    """Each of a token's experts: three products of C by F."""
    model = build_model(load_recipe("quick").run_config("cnn", "deepseek_mla", 0), 10)
    calls = []
    counted = OPS["moe_grouped"].flops

    def formula(x, w, *rest, **options):
        calls.append((x, w))
        return counted(x, w, *rest, **options)

    whole = forward_flops(model)
    monkeypatch.setattr(OPS["moe_grouped"], "flops", formula)
    assert forward_flops(model) == whole and len(calls) == 2
    (rows, c), (experts, f2, _) = calls[0]
    assert calls[1] == ((rows, f2 // 2), (experts, c, f2 // 2))
    monkeypatch.setattr(OPS["moe_grouped"], "flops", lambda *_, **__: 0)
    assert whole - forward_flops(model) == rows * 2 * 3 * c * (f2 // 2) > 0


@pytest.mark.parametrize("n, block, slots", [(64, 16, 32), (70, 16, 32), (9, 16, 4)])
def test_h2o_counts_the_pairs_of_its_blocks(n, block, slots):
    q, v = (2, 3, n, 8), (2, 3, n, 5)
    blocks = -(-n // block)
    pairs = 0
    for i in range(n):
        t = i // block
        pairs += min(slots, t * block) + min(block, n - t * block)
    chosen = (2, 3, blocks, slots)
    given = OPS["h2o_attend"].flops(q, q, v, chosen, None, True, False, block, 0.3)
    assert given == 2 * 2 * 3 * pairs * (8 + 5)


def test_an_op_without_a_formula_cannot_be_made():
    with pytest.raises(TypeError, match="flops"):
        Op("uncounted", "(Tensor x) -> Tensor", torch.clone)
    assert "uncounted" not in OPS and not hasattr(torch.ops.tab, "uncounted")


def test_every_forward_op_of_the_layers_is_counted():
    for attention in ("linear", "performer", "local", "sparse", "kv_compression", "kimi_k2"):
        with torch.no_grad():
            assert of(attention) > of("none")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", layer_names())
def test_as_pytorch_counts(attention):
    with torch.device("meta"):
        config = load_recipe("quick").run_config("cnn", attention, 0)
        model = build_model(config, 10).eval()
    assert forward_flops(model) == pytorchs(model, model.backbone.example().to("meta")) > 0


def pytorchs(module, x):
    mapping = {getattr(torch.ops.tab, name): op.flops for name, op in OPS.items()}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        module(x)
    return counter.get_total_flops()


class Operators(nn.Module):
    """Of another operator, and of a kind that torch takes apart itself."""

    def forward(self, x):
        (y,) = cond_op(x.sum() > 0, lambda x: (x @ x.mT,), lambda x: (x @ x.mT + 1,), (x,))
        return torch.einsum("nd,md->nm", x, x) + nn.functional.linear(x, x) + y


def test_operators_of_operators_count():
    x = torch.ones(16, 8)
    assert flops_on(Operators(), x) == pytorchs(Operators().eval(), x) == 3 * 2 * 16 * 16 * 8


def test_local_pairs_of_a_long_line_and_a_large_grid():
    """Counted without all pairs at once: of these there are 10¹⁰."""
    n, d = 100_000, 8
    q, flops = (1, 2, n, d), OPS["local_fwd"].flops
    pairs = n * (10 + 1 + 5) - (10 * 11 + 5 * 6) // 2  # what the ends cut off
    assert flops(q, q, q, None, None, 10, 5, 0, 0, False) == 2 * 2 * pairs * 2 * d
    side = 100
    reach = side * (2 * 1 + 1) - 2  # on each axis
    q = (1, 2, side * side, d)
    assert flops(q, q, q, None, None, 1, 1, side, side, False) == 2 * 2 * reach**2 * 2 * d
