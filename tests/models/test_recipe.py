"""Recipes: what the shipped ones say, layers of a recipe, and errors that name the way out."""

import math
import typing

import pytest

from tab.layers import attention_names, attention_options, layer_names, option_types
from tab.models.flops import forward_flops
from tab.models.image_model import build_model, model_names, parameter_count
from tab.recipe.recipe import load_recipe, parse_override, recipe_names
from tab.run_config import MODELS, SECTIONS, RunConfig


def write(folder, text, name="mine.toml"):
    path = folder / name
    path.write_text(text)
    return path


def test_names():
    assert {"document", "fair", "quick"} <= set(recipe_names())


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize("model", model_names())
def test_every_shipped_recipe_resolves_for_every_attention(recipe, model):
    for attention in layer_names():
        config = load_recipe(recipe).run_config(model, attention, seed=3)
        assert config.id == f"{model}-{attention}-s3"
        assert RunConfig.from_dict(config.to_dict()) == config


def test_document_holds_the_published_configurations():
    recipe = load_recipe("document")
    assert recipe.run_config("mlp", "none", 0).model_options.hidden == 512
    assert recipe.run_config("mlp", "multi_head", 0).model_options.hidden == 256
    assert recipe.run_config("cnn", "multi_head", 0).model_options.hidden == 512
    assert recipe.run_config("cnn", "linear", 0).model_options.hidden == 256
    assert recipe.run_config("mlp", "linear", 0).attention_options == {
        "num_heads": 4,
        "kernel_size": 128,
    }
    train = recipe.run_config("cnn", "none", 0).train
    assert (train.lr, train.batch_size, train.epochs) == (0.001, 512, 100)
    assert recipe.run_config("cnn", "none", 0).evaluate.split == "test"


def test_base_file_and_overrides_are_layers(tmp_path):
    write(tmp_path, 'base = "document"\n[train]\nepochs = 7\n', "below.toml")
    path = write(tmp_path, 'base = "below.toml"\n[attention.linear.mlp]\nkernel_size = 16\n')
    recipe = load_recipe(path, {"train.lr": 1, "attention.linear.mlp.hidden": 64})
    config = recipe.run_config("mlp", "linear", 0)
    assert recipe.name == "mine"
    assert (config.train.epochs, config.train.lr, config.train.batch_size) == (7, 1.0, 512)
    assert config.attention_options == {"num_heads": 4, "kernel_size": 16}
    assert config.model_options.hidden == 64
    assert recipe.run_config("cnn", "linear", 0).attention_options["kernel_size"] == 128


def test_an_override_of_a_model_reaches_every_attention():
    recipe = load_recipe("document", {"model.cnn.hidden": 64})
    assert {recipe.run_config("cnn", a, 0).model_options.hidden for a in attention_names()} == {64}
    assert recipe.run_config("mlp", "none", 0).model_options.hidden == 512


def pairs() -> list[tuple[str, str]]:
    """(mechanism, option) of what `fair` says of a mechanism in a model."""
    tables = load_recipe("fair").tables["attention"]
    found = {(a, k) for a, t in tables.items() for m in t if m in MODELS for k in t[m]}
    return sorted(found)


@pytest.mark.parametrize(("attention", "option"), pairs())
def test_an_override_of_a_mechanism_reaches_every_model(attention, option):
    """A base may have said otherwise of it in one model; what the same layer says of that stays."""
    value, narrow = (False, True) if option == "two_dimensional" else (3, 2)
    set_ = {f"model.{model}.match": "" for model in model_names()}
    set_[f"attention.{attention}.{option}"] = value

    def chosen(model):
        return load_recipe("fair", set_).run_config(model, attention, 0).attention_options[option]

    assert {chosen(model) for model in model_names()} == {value}
    set_[f"attention.{attention}.cnn.{option}"] = narrow
    assert [chosen(model) for model in ("cnn", "vit")] == [narrow, value]


@pytest.mark.parametrize("name", recipe_names())
def test_toml_comes_back_as_it_is(tmp_path, name):
    recipe = load_recipe(name, {"train.lr": 1e-5})
    again = load_recipe(write(tmp_path, recipe.to_toml(), f"{name}.toml"))
    assert again == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.leraning_rate": 1}, "learning_rate|label_smoothing|did you mean"),
        ({"train.epoch": 1}, "did you mean 'epochs'"),
        ({"trian.epochs": 1}, "did you mean 'train'"),
        ({"model.cn.hidden": 1}, "did you mean 'cnn'"),
        ({"model.cnn.hiden": 1}, "did you mean 'hidden'"),
        ({"attention.linaer.num_heads": 1}, "did you mean 'linear'"),
        ({"attention.linear.kernel_sise": 1}, "did you mean 'kernel_size'"),
        ({"attention.linear.cnn.hiden": 1}, "did you mean 'hidden'"),
        ({"train.epochs": 2.5}, "train.epochs = 2.5: give an integer"),
        ({"train.epochs": True}, "train.epochs = True: give an integer"),
        ({"train.epochs": 0}, "must be above 0"),
        ({"train.lr": "fast"}, "train.lr = 'fast': give a number"),
        ({"train.schedule": "cosine"}, "'constant', 'one_cycle'"),
        ({"model.cnn.tokens": "all"}, "give an integer or 'grid'"),
        ({"model.mlp.tokens": "grid"}, "give an integer"),
        ({"attention.linear.num_heads": "two"}, "give an integer"),
        ({"train": 3}, "override train = 3: give a table of keys"),
        ({"attention.local": 3}, "override attention.local = 3: give a table of keys"),
        ({"base": "quick"}, "override base: give the recipe itself, with --recipe"),
        ({"data.translate": 32}, "from 0 to 31"),
        ({"train.lr": 10**400}, "0: give a number of 64 bits"),
        ({"data.images": 2**63}, "give a number of 64 bits"),
        ({"model.vit.patch": True}, r"model\.vit\.patch = True: give 1, 2, 4, 8"),
        ({"model.vit.patch": 4.0}, r"model\.vit\.patch = 4\.0: give 1, 2, 4, 8"),
        ({"model.resnet9.cells": 8.0}, r"cells = 8\.0: give 4, 8"),
        ({"train.lr": math.inf}, r"train\.lr = inf: must be above 0 and finite"),
        ({"attention.linear.inner_dim": 8.0}, "inner_dim = 8.0: give an integer"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        load_recipe("fair", overrides)
    assert str(error.value).count(*overrides) <= 1


@pytest.mark.parametrize("key", ["attention.local.window_size", "attention.local.cnn.window_size"])
def test_a_key_of_a_mechanism_is_named_once(key):
    with pytest.raises(ValueError, match=f"^override {key} = '': give an integer$"):
        load_recipe("fair", {key: ""})


def numbers() -> list[tuple[str, str]]:
    """(attention, key) of each number that a recipe can hold, but for the seeds."""
    tables = load_recipe("fair").tables
    keys = [("none", f"{part}.{key}") for part in SECTIONS for key in number_keys(tables[part])]
    for model in tables["model"]:
        keys += [("none", f"model.{model}.{key}") for key in number_keys(tables["model"][model])]
    for name in layer_names():
        options, hints = attention_options(name), option_types(name)
        known = [k for k in options if {int, float} & {hints[k], *typing.get_args(hints[k])}]
        keys += [(name, f"attention.{name}.mlp.{key}") for key in known]
    return [(name, key) for name, key in keys if "seed" not in key.split(".")[-1]]


def number_keys(table: dict) -> list[str]:
    return [key for key, value in table.items() if type(value) in (int, float)]


@pytest.mark.parametrize(("attention", "key"), numbers())
def test_no_number_of_a_recipe_may_be_infinite_nan_or_negative(attention, key):
    *_, option = key.split(".")
    small = {"model.mlp.match": "", "model.mlp.hidden": 16, "model.mlp.tokens": 4}
    small |= {"model.cnn.match": "", "model.resnet9.match": ""}
    if attention == "kimi_k2":
        small["attention.kimi_k2.mlp.attention"] = "mla"  # which has more options
    for value in (math.inf, math.nan, -1):
        with pytest.raises(ValueError, match=option) as error:
            recipe = load_recipe("fair", {**small, key: value})
            build_model(recipe.run_config("mlp", attention, 0), 10)
        assert str(value) in str(error.value)


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'fair'"):
        load_recipe("fiar")
    with pytest.raises(ValueError, match="no recipe file"):
        load_recipe(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match="not TOML"):
        load_recipe(write(tmp_path, "train ="))
    with pytest.raises(ValueError, match=r"train: epochs.* missing"):
        load_recipe(write(tmp_path, "[data]\nflip = true\n"))
    with pytest.raises(ValueError, match="leads back to itself"):
        load_recipe(write(tmp_path, 'base = "mine.toml"'))


def test_unknown_variants():
    recipe = load_recipe("fair")
    with pytest.raises(ValueError, match=f"seed = {2**63}: give a number of 64 bits"):
        recipe.run_config("mlp", "none", 2**63)
    with pytest.raises(ValueError, match="did you mean 'mlp'"):
        recipe.run_config("mpl", "none", 0)
    with pytest.raises(ValueError, match="did you mean 'linear'"):
        recipe.run_config("mlp", "liner", 0)


def test_override_texts():
    assert parse_override("train.lr=0.01") == ("train.lr", 0.01)
    assert parse_override("data.flip = true") == ("data.flip", True)
    assert parse_override("model.cnn.stem=stride") == ("model.cnn.stem", "stride")
    assert parse_override("train.lr=.01") == ("train.lr", 0.01)
    for text in ("train.lr", "=1", "train.lr=0.1\ntrain.epochs=3"):
        with pytest.raises(ValueError, match="KEY=VALUE"):
            parse_override(text)


@pytest.mark.parametrize("model", model_names())
def test_widths_are_matched(model):
    recipe = load_recipe("fair", {f"model.{model}.match": "multi_head"})
    plain = load_recipe("fair", {f"model.{model}.match": ""})
    target = parameter_count(build_model(plain.run_config(model, "multi_head", 0), 10))
    width = plain.run_config(model, "multi_head", 0).model_options.hidden
    assert recipe.run_config(model, "multi_head", 0).model_options.hidden == width
    for attention in attention_names():
        config = recipe.run_config(model, attention, 0)
        count = parameter_count(build_model(config, 10))
        assert abs(count / target - 1) < 0.02, (attention, config.model_options.hidden, count)
    # Sixteen tokens of the MLP have no width in between.
    assert recipe.run_config(model, "none", 0).model_options.hidden >= width + (model != "mlp")


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_widths_are_matched_by_flops(model):
    recipe = load_recipe("fair_flops")
    target = forward_flops(build_model(recipe.run_config(model, "multi_head", 0), 10))
    off = {}
    for attention in attention_names():
        net = build_model(recipe.run_config(model, attention, 0), 10)
        off[attention] = abs(forward_flops(net) / target - 1)  # on the CPU; matched on meta
    assert max(off.values()) < 0.02, off


@pytest.mark.parametrize("attention", ["deepseek_mla", "kimi_k2"])
@pytest.mark.parametrize("match", ["multi_head", "flops:multi_head"])
def test_experts_match_where_widths_do_not(attention, match):
    small = {"model.cnn.hidden": 64, "model.cnn.channels": 16, "model.cnn.match": match}
    cost = forward_flops if match.startswith("flops:") else parameter_count

    def size(name, **more):
        config = load_recipe("fair", small | more).run_config("cnn", name, 0)
        return config, cost(build_model(config, 10))

    _, target = size("multi_head")
    config, matched = size(attention)
    assert abs(matched / target - 1) < 0.011, (config, matched, target)
    assert config.attention_options["expert_dim"] > 1
    # A recipe's own choice stays, and is worse.
    config, own = size(attention, **{f"attention.{attention}.expert_dim": 500})
    assert config.attention_options["expert_dim"] == 500
    assert abs(own / target - 1) > abs(matched / target - 1)


def test_what_to_match_is_an_attention():
    with pytest.raises(ValueError, match=r"model.cnn.match: .* did you mean 'flops:multi_head'"):
        load_recipe("fair", {"model.cnn.match": "flops:multihead"})
    for match in ("flops:", ":", "flop:self"):
        with pytest.raises(ValueError, match=r"model.cnn.match: unknown"):
            load_recipe("fair", {"model.cnn.match": match})
    with pytest.raises(ValueError, match=r"model.cnn.match: .* did you mean 'multi_head'"):
        load_recipe("fair", {"model.cnn.match": "multihead"})
