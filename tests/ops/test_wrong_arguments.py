"""What a caller gets wrong, at every public function: the error names the argument and what was
given, in the caller's own layout, and no number comes out that means nothing."""

import math

import pytest
import torch

import tab

B, H, N, D = 2, 4, 12, 8
Q = torch.ones(B, H, N, D)
LATENTS = {
    "q_nope": Q, "q_rope": torch.ones(B, H, N, 2), "c_kv": torch.ones(B, N, 6),
    "k_rope": torch.ones(B, N, 2), "w_uk": torch.ones(H, D, 6), "w_uv": torch.ones(H, 5, 6),
}  # fmt: skip
QKV = {"q": Q, "k": Q, "v": Q}
MASK, HEADS = {"key_mask": torch.ones(B, N, dtype=torch.bool)}, torch.ones(H)
SCORES = {**MASK, "sinks": HEADS, "alibi": HEADS}
TENSORS = {  # function -> its tensors, by name
    "linear_attention": {**QKV, **MASK},
    "gated_linear_attention": {**QKV, "log_decay": -HEADS, **MASK},
    "performer_attention": {**QKV, "projection": torch.ones(3, D), **MASK},
    "local_attention": {**QKV, **SCORES},
    "sparse_attention": {**QKV, **SCORES},
    "mla_attention": {**LATENTS, **SCORES},
    "h2o_attention": {**QKV, **MASK},
    "linformer_attention": {**QKV, "E": torch.ones(N, 3), "F": torch.ones(N, 3), **MASK},
    "merge_attention": {
        "o1": Q, "lse1": torch.ones(B, H, N), "o2": Q, "lse2": torch.ones(B, H, N),
    },
    "merge_sinks": {"o": Q, "lse": torch.ones(B, H, N), "sinks": HEADS},
    "mla_decode": {
        "q_nope": torch.ones(B, H, D), "q_rope": torch.ones(B, H, 2),
        "cache": torch.ones(3, 4, 8), "seqlens": torch.tensor([3, 4]),
        "page_table": torch.zeros(B, 1, dtype=torch.int32),
        "w_uk": LATENTS["w_uk"], "w_uv": LATENTS["w_uv"],
    },
    "noaux_tc_gate": {"logits": torch.ones(N, 4), "bias": torch.ones(4)},
    "moe_experts": {
        "x": torch.ones(2, 8), "w13": torch.ones(4, 6, 8), "w2": torch.ones(4, 8, 3),
        "weights": torch.ones(2, 2), "index": torch.tensor([[0, 1], [2, 3]]),
        "counts": torch.ones(4, dtype=torch.int64),
    },
}  # fmt: skip
MORE = {
    "local_attention": {"window": 3},
    "sparse_attention": {"pattern": tab.BlockPattern.sliding_window(N, window=2, block_size=4)},
    "h2o_attention": {"heavy": 2, "recent": 2},
    "noaux_tc_gate": {"top_k": 2},
}
OPTIONAL = ("key_mask", "sinks", "alibi", "F", "page_table")
LAYOUTS = [name for name in TENSORS if "key_mask" in TENSORS[name]]
STATES = {
    "linear_attention": r"\(S \(2, 4, 8, 8\), z \(2, 4, 8\)\)",
    "performer_attention": r"\(S \(2, 4, 3, 8\), z \(2, 4, 3\), c \(2, 4, 3\)\)",
    "gated_linear_attention": r"S \(2, 4, 8, 8\)",
}


def call(name, **changed):
    return getattr(tab, name)(**{**TENSORS[name], **MORE.get(name, {}), **changed})


def turned(name):
    return {key: x.transpose(1, 2) for key, x in TENSORS[name].items() if x.dim() == 4}


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name in TENSORS for argument in TENSORS[name]]
)
def test_what_is_no_tensor_is_named(name, argument):
    call(name)  # all others are right
    given = TENSORS[name][argument]
    for layout in ("bhnd", "bnhd") if name in LAYOUTS else ("bhnd",):
        more = {} if layout == "bhnd" else {**turned(name), "layout": layout}
        for other in (given.numpy(), given.tolist(), 0.5):
            kind = type(other).__name__
            words = rf"{name}\(\): argument '{argument}' must be Tensor, not {kind}; torch.as_ten"
            with pytest.raises(TypeError, match=words):
                call(name, **{**more, argument: other})
    if argument not in OPTIONAL or (name, argument) == ("merge_sinks", "sinks"):
        with pytest.raises(TypeError, match=f"'{argument}' must be Tensor, not NoneType$"):
            call(name, **{argument: None})


@pytest.mark.parametrize("name", LAYOUTS)
def test_shapes_are_printed_as_they_were_given(name):
    given = turned(name)
    heads = [*given]
    call(name, **given, layout="bnhd")
    for wrong in (given[heads[1]][:, :, :, :1].repeat(1, 2, 3, 1), given[heads[1]].int()):
        with pytest.raises(ValueError) as error:
            call(name, **{**given, heads[1]: wrong}, layout="bnhd")
        assert f"{heads[1]} {tuple(wrong.shape)}" in str(error.value)
        assert str(tuple(TENSORS[name][heads[0]].shape)) not in str(error.value)
    with pytest.raises(ValueError, match=r"\(B, N, H, D"):
        call(name, **{**given, heads[0]: given[heads[0]][0]}, layout="bnhd")


def test_a_decay_is_printed_as_it_was_given():
    x, decay = torch.ones(B, N, H, D), torch.zeros(B, H, N)
    with pytest.raises(ValueError, match=r"\(4,\), \(2, 12, 4\) or .*; got log_decay \(2, 4, 12\)"):
        tab.gated_linear_attention(x, x, x, decay, layout="bnhd")
    x = torch.ones(B, H, N, D)
    with pytest.raises(ValueError, match=r"\(4,\), \(2, 4, 12\) or .*; got log_decay \(2, 12, 4\)"):
        tab.gated_linear_attention(x, x, x, decay.mT)


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_other_parts_is_told_which_it_has(name):
    _, state = call(name, return_state=True)
    parts = state if isinstance(state, tuple) else (state,)
    call(name, initial_state=state)
    rule = rf"{name} wants initial_state {STATES[name]} in float32 on cpu, as return_.*; got "
    for wrong, told in (
        ((), "tuple of 0"), ((*parts, Q), f"tuple of {len(parts) + 1}"), (0.5, "float"),
        ([x[:1] for x in parts], r"S \(1, 4"), ([x.double() for x in parts], "S .* float64"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rule + told):
            call(name, initial_state=wrong)
    with pytest.raises(TypeError, match="argument 'S' must be Tensor, not NoneType"):
        call(name, initial_state=(None, *parts[1:]))


@pytest.mark.parametrize("name", ["linear_attention", "performer_attention"])
def test_eps_is_added_to_the_denominator(name):
    with pytest.raises(ValueError, match=f"{name} wants eps ≥ 0, got -1"):
        call(name, eps=-1.0)
    with pytest.raises(ValueError, match=f"{name} wants a finite eps, got nan"):
        call(name, eps=math.nan)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "linear" not in name
                                  and name not in ("performer_attention",)])  # fmt: skip
@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_scale_is_a_number(name, scale):
    with pytest.raises(ValueError, match=f"{name} wants a finite scale, got {scale}"):
        call(name, scale=scale)
