"""What a mechanism cannot answer, told from its pattern and its weights before it is trained."""

import pytest
import torch

from tab.analysis.ceiling import Ceiling, ceiling
from tab.data.sequences import TASKS, answer_places, draw, most_common
from tab.recipe.recipe import load_recipe

N = 16
GUESS = 1 / 16


def found(attention, task, **changes) -> Ceiling:
    small = {"model.tokens.tokens": N, "model.tokens.hidden": 16, "attention.linformer.k": 4}
    recipe = load_recipe("recall", small | {k.replace("__", "."): v for k, v in changes.items()})
    return ceiling(recipe.run_config("tokens", attention, 0), draw(task, N, 300, stream=1))


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_stands_at_its_place(task):
    split = draw(task, N, 20, stream=1)
    values = split.tokens[..., 1].gather(1, answer_places(split))
    assert torch.equal(values, split.labels)


def test_the_most_common_value():
    """Among N − 1 values of a needle: right so often, by counting."""
    split = draw("recall", N, 200, stream=1)
    right = []
    for values, labels in zip(split.tokens[:, : N // 2, 1], split.labels, strict=True):
        right += (labels == torch.bincount(values, minlength=16).argmax()).tolist()
    assert most_common(split) == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("attention", ["none", "ffn"])
def test_without_other_tokens_there_is_only_guessing(attention, task):
    assert found(attention, task) == Ceiling(GUESS, "out of reach")


@pytest.mark.parametrize("attention", ["multi_head", "linear", "kimi_k2", "kv_compression"])
def test_who_sees_all_has_no_ceiling(attention):
    assert {found(attention, task) for task in TASKS} == {Ceiling(1.0)}


def test_static_mixes_are_blind_to_keys_and_not_to_places():
    split = draw("recall", N, 300, stream=1)
    for attention in ("mixer", "uniform"):
        assert found(attention, "recall") == Ceiling(most_common(split), "blind to keys")
    assert found("mixer", "copy") == Ceiling(1.0)
    assert found("uniform", "copy").why == "blind to places"
    assert found("dwconv", "copy") == Ceiling(GUESS, "out of reach")
    deep = found("mixer", "recall", model__tokens__depth=2, model__tokens__match="")
    assert deep == Ceiling(1.0)  # a second block may join key and value


def test_a_window_reaches_what_it_reaches():
    """8 places ask of the 8 before: of the pairs of both, i + 8 − j ≤ 4 for 4 + 3 + 2 + 1 − 4."""
    window = {"attention__local__window_size": 8, "attention__local__num_heads": 2}
    hears = sum(8 + i - j <= 4 for i in range(8) for j in range(8)) / 64
    many = found("local", "recall", **window)
    assert many.why == "out of reach"
    assert many.accuracy == pytest.approx(hears + (1 - hears) * GUESS, abs=0.02)
    assert found("local", "copy", **window).accuracy == GUESS
