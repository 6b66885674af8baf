"""Numbers, texts, True and False of another type: every public function, layer and cache names the
argument, and none takes "no" for True."""

import inspect
import re
import types
import typing

import numpy as np
import pytest
import torch
from torch import nn

import tab
from tab.layers import HeadsAttention, build_attention, get_attention, layer_names
from tab.ops._typed import typed

Q, W = torch.ones(1, 2, 8, 4), torch.ones(3, 4)
QKV, N = {"q": Q, "k": Q, "v": Q}, 8
PATTERN = tab.BlockPattern.sliding_window(N, window=2, block_size=4)
UP = {"w_uk": torch.ones(2, 4, 6), "w_uv": torch.ones(2, 5, 6)}
SMALL = {"recipe": "quick", "data": "shapes:20/10", "tell": None}
CALLS = {  # a call of each public function that would go well
    "linear_attention": QKV,
    "gated_linear_attention": {**QKV, "log_decay": -torch.ones(2)},
    "performer_attention": {**QKV, "projection": W},
    "local_attention": {**QKV, "window": 3},
    "sparse_attention": {**QKV, "pattern": PATTERN},
    "mla_attention": {
        **{"q_nope": Q, "q_rope": Q, "c_kv": torch.ones(1, N, 6), "k_rope": Q[:, 0], **UP},
    },
    "mla_decode": {
        **{"q_nope": torch.ones(2, 2, 4), "q_rope": torch.ones(2, 2, 2), **UP},
        **{"cache": torch.ones(3, 4, 8), "seqlens": torch.tensor([3, 4])},
        "page_table": torch.zeros(2, 1, dtype=torch.int32),
    },
    "h2o_attention": {**QKV, "heavy": 2, "recent": 2},
    "linformer_attention": {**QKV, "E": torch.ones(N, 3)},
    "noaux_tc_gate": {"logits": torch.ones(N, 4), "bias": torch.ones(4), "top_k": 2},
    "orthogonal_projection": {"num_features": 3, "head_dim": 4},
    "BlockPattern.bigbird": {"n": N, "heads": 2},
    "BlockPattern.sliding_window": {"n": N, "window": 2},
    "BlockPattern.dilated": {"n": N, "window": 3, "dilation": 2},
    "BlockPattern.strided": {"n": N, "stride": 2},
    "BlockPattern.fixed": {"n": N, "stride": 2},
    "BlockPattern.from_blocks": {"mask": torch.ones(1, 1) > 0, "block_size": N, "n": N},
    "GatedLinearCache": {}, "KVCache": {}, "LinearCache": {}, "LocalCache": {"window": 3},
    "MLACache": UP, "PagePool": {"pages": 2, "page_size": 4, "width": 8},
    "PerformerCache": {"projection": W}, "SparseCache": {"pattern": PATTERN},
    "H2OCache": {"heavy": 2, "recent": 2},
    "compare": {**SMALL, "attentions": "none", "models": "mlp", "epochs": 1},
    "sweep": {**SMALL, "attentions": "none", "models": "mlp", "space": "tuning"},
    "bench": {"ops": "linear", "sizes": "tiny", "tell": None},
}  # fmt: skip
NONE = {  # of tensors alone, or of a path, which the operating system checks
    *("merge_attention", "merge_sinks", "moe_experts", "use_backend", "DecodeCache"),
    *("BlockPattern", "functional", "load_model", "load_study", "swap_attention"),
}
WRONG = {bool: ["no", 1, 0.0, torch.tensor(True)], int: ["x", 2.5, [1], {}],
         float: ["x", [1], {}], str: [2.5, [1], {}]}  # fmt: skip


def function_of(name: str):
    found = tab
    for part in name.split("."):
        found = getattr(found, part)
    return found


def scalars(function) -> list[tuple[str, set[type]]]:
    """Its parameters that are numbers, texts, True or False, and what each may be."""
    found = []
    hinted = function.__init__ if inspect.isclass(function) else inspect.unwrap(function)
    for name, hint in typing.get_type_hints(hinted).items():
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = set(typing.get_args(hint)) if union else {hint}
        if typing.get_origin(hint) is typing.Literal:
            kinds = {str}
        if kinds & {*WRONG} and kinds <= {*WRONG, type(None)} and name != "return":
            found.append((name, kinds))
    return found


def cases():
    for name in CALLS:
        for argument, kinds in scalars(function_of(name)):
            kind = next(kind for kind in WRONG if kind in kinds)
            wrong = WRONG[kind] + ([] if type(None) in kinds else [None])
            yield from ((name, argument, each) for each in wrong if type(each) not in kinds)


def test_every_public_name_is_called_here():
    assert {name.split(".")[0] for name in CALLS} | NONE == {*tab.__all__}
    for name in NONE - {"BlockPattern", "functional", "swap_attention", "use_backend"}:
        numbers = [kinds for _, kinds in scalars(function_of(name)) if kinds & {bool, int, float}]
        assert not numbers, name


@pytest.mark.parametrize(
    ("name", "argument", "given"),
    [*cases()],
    ids=lambda x: x if isinstance(x, str) else repr(x)[:9],
)
def test_the_argument_is_named(name, argument, given):
    """And nothing is computed, trained or written before."""
    function, good = function_of(name), CALLS[name]
    if name not in ("compare", "sweep", "bench"):
        function(**good)
    with pytest.raises((TypeError, ValueError), match=argument) as error:
        function(**{**good, argument: given})
    if "bool" in str(typing.get_type_hints(inspect.unwrap(function)).get(argument, "")):
        assert error.type is TypeError and f"argument '{argument}' must be bool" in str(error.value)


def test_methods_refuse_them_too():
    with pytest.raises(TypeError, match=r"H2OCache.step\(\): argument 'causal' must be bool"):
        tab.H2OCache(heavy=2, recent=2).step(Q, Q, Q, causal="no")
    with pytest.raises(TypeError, match=r"to_block_mask\(\): argument 'causal' must be bool"):
        PATTERN.to_block_mask(causal=1)
    with pytest.raises(TypeError, match=r"from_block_mask\(\): argument 'causal' must be bool"):
        tab.BlockPattern.from_block_mask(PATTERN.to_block_mask(), causal=None)
    with pytest.raises(TypeError, match=r"get_attention\(\): argument 'published' must be bool"):
        tab.layers.attention_options("linear", published="no")
    with pytest.raises(TypeError, match=r"register_attention\(\): argument 'published' must be b"):
        tab.layers.register_attention("mine", published="no")


@pytest.mark.parametrize("name", layer_names())
def test_every_option_of_every_layer(name):
    kind = get_attention(name)
    for option, kinds in scalars(kind):
        for given in WRONG[next(each for each in WRONG if each in kinds)]:
            if type(given) in kinds:
                continue
            said = rf"^{kind.__qualname__}\(\): argument '{option}' must be .*, not "
            with pytest.raises(TypeError, match=said):
                kind(**{"dim": 32, "seq_len": 16, option: given})
            if option in ("dim", "seq_len"):
                said = rf"^build_attention\(\): argument '{option}' must be int, not"
                with pytest.raises(TypeError, match=said):
                    build_attention(name, **{"dim": 32, "seq_len": 16, option: given})
    for grid in ("x", 4, (4,), (4, "x"), (2, 2, 4)):
        with pytest.raises(TypeError, match=r"argument 'grid' must be \(int, int\) or None, not"):
            kind(32, seq_len=16, grid=grid)
    assert kind(np.int64(32), seq_len=np.int32(16), grid=[4, np.int64(4)]) is not None


def test_layers_of_others_are_held_to_what_they_say():
    class Mine(HeadsAttention):
        def __init__(self, dim, *, seq_len, grid=None, sharp: bool = False, rule=None):
            super().__init__(dim, seq_len=seq_len, grid=grid)

    Mine(32, seq_len=16, sharp=True, rule="anything")
    with pytest.raises(TypeError, match=r"Mine\(\): argument 'sharp' must be bool, not str"):
        Mine(32, seq_len=16, sharp="no")
    with pytest.raises(TypeError, match="seq_len"):
        Mine(32)


@pytest.mark.parametrize(
    "given",
    [
        {"seq_len": "x"}, {"seq_len": 2.5}, {"grid": 3}, {"carry": "no"}, {"carry": 0},
        {"attention": 3}, {"modules": 3}, {"modules": "self_attn"},
        {"num_features": "x"}, {"rope": "no"}, {"model": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_what_swap_attention_is_given(given):
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    (argument,) = given
    good = {"model": layer, "attention": "performer", "seq_len": 16}
    with pytest.raises(TypeError, match=rf"\(\): argument '{argument}' must be .*, not "):
        tab.swap_attention(**{**good, **given})
    assert type(layer.self_attn) is nn.MultiheadAttention
    tab.swap_attention(**good)


def test_an_error_says_what_it_wants_and_what_it_got():
    @typed
    def call(a: int, pairs: list[tuple[int, float]] | None = None, /, *more: int, **rest: bool):
        return a, pairs, more, rest

    given = np.int64(3), [(1, np.float32(2))], "x"
    assert call(*given, y="z") == (3, [(1, 2.0)], ("x",), {"y": "z"})
    assert type(call(np.int64(3))[0]) is int
    with pytest.raises(TypeError, match=re.escape("must be int, not str; got 'three'")):
        call("three")
    with pytest.raises(TypeError, match=r"argument 'pairs' must be list of \(int, float\) or None"):
        call(1, [(1,)])
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        call()
