"""Search spaces: what is drawn for whom, what is refused, and what draws promise."""

import pytest

from tab.layers import attention_names, attention_options
from tab.models.image_model import model_names
from tab.recipe.recipe import PAIR_TRAIN, load_recipe
from tab.sweep.space import Range, load_space, possible, size, space_names, with_chosen

optuna = pytest.importorskip("optuna")

from tab.sweep.record import PairRecord  # noqa: E402


@pytest.fixture
def space(tmp_path):
    def make(text: str):
        path = tmp_path / "space.toml"
        path.write_text(text)
        return load_space(path)

    return make


def record(axes) -> PairRecord:
    return PairRecord(optuna.create_study(direction="maximize"), axes)


def draws(axes, count, possible=lambda chosen: True, sampler="random", seed=0):
    return record(axes).draw(count, possible, sampler=sampler, seed=seed, step=(0, 0))


def test_the_published_space():
    published = load_space("published")
    assert published.axes("mlp", "none") == {"lr": [0.001, 0.003, 0.01], "hidden": [256, 512]}
    assert published.axes("cnn", "linformer") == {
        **published.axes("mlp", "self"),
        "num_heads": [2, 4, 8],
        "k": [32, 64, 128, 256],
        "max_seq_len": [512, 1024],
    }
    assert published.axes("cnn", "kv_compression")["compression_ratio"] == [0.25, 0.5, 0.75]
    assert published.axes("cnn", "sparse")["block_size"] == [32, 64, 128]
    assert published.axes("cnn", "local")["window_size"] == [16, 32, 64, 128]
    assert published.axes("cnn", "linear")["kernel_size"] == [16, 32, 64, 128]
    assert published.axes("cnn", "performer")["num_features"] == [64, 128, 256, 512]


@pytest.mark.parametrize("name", space_names())
def test_every_option_is_one_of_its_mechanism_and_the_file_reads_back(name, tmp_path):
    it = load_space(name)
    for model in model_names():
        for attention in attention_names():
            options = set(it.axes(model, attention)) - {*PAIR_TRAIN, "hidden"}
            assert options <= set(attention_options(attention))
    path = tmp_path / f"{name}.toml"
    path.write_text(it.to_toml())
    assert load_space(path) == it


def test_narrower_tables_win(space):
    it = space(
        "[train]\nlr = [1, 2]\n[model]\nhidden = [8]\n[model.cnn]\nhidden = [16]\nchannels = [4]\n"
        "[attention]\nnum_heads = [2]\n[attention.local]\nnum_heads = [4]\n"
        "[attention.local.cnn]\nlr = { low = 1e-3, high = 1e-2, log = true }\nwindow_size = [2]\n"
    )
    assert it.axes("mlp", "multi_head") == {"lr": [1, 2], "hidden": [8], "num_heads": [2]}
    assert it.axes("cnn", "local") == {
        "lr": Range(0.001, 0.01, True),
        "hidden": [16],
        "channels": [4],
        "num_heads": [4],
        "window_size": [2],
    }
    assert it.axes("mlp", "local")["num_heads"] == [4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nlrr = [1]", "did you mean 'lr'"),
        ("[train]\nepochs = [1]", "unknown 'epochs'"),
        ("[model]\nhiden = [1]", "did you mean 'hidden'"),
        ("[model.mlp]\nchannels = [1]", "unknown 'channels'"),
        ("[attention]\nnum_head = [1]", "did you mean 'num_heads'"),
        ("[attention.local]\nk = [1]", "unknown 'k'"),
        ("[train]\nlr = []", "at least one"),
        ("[train]\nlr = [1, 1]", "each value once"),
        ("[train]\nlr = 0.1", "give a list"),
        ("[train]\nlr = { low = 1 }", "needs low and high"),
        ("[train]\nlr = { low = 2, high = 1 }", "low < high"),
        ("[train]\nlr = { low = 0, high = 1, log = true }", "0 < low < high"),
        ("lr = ", "not TOML"),
    ],
)
def test_a_bad_space_is_an_error_that_says_what(text, message, space):
    with pytest.raises(ValueError, match=message):
        space(text)


def test_unknown_names_and_files():
    with pytest.raises(ValueError, match="did you mean 'published'"):
        load_space("publishd")
    with pytest.raises(ValueError, match="there is no file"):
        load_space("nowhere.toml")


def test_draws_are_new_possible_and_a_function_of_the_seed():
    axes = {"a": [1, 2, 3, 4], "b": Range(0.0, 1.0)}
    first = draws(axes, 12, lambda chosen: chosen["a"] != 2)
    assert first == draws(axes, 12, lambda chosen: chosen["a"] != 2)
    assert first != draws(axes, 12, lambda chosen: chosen["a"] != 2, seed=1)
    assert len(first) == 12 and {c["a"] for c in first} == {1, 3, 4}
    assert all(0 <= c["b"] <= 1 for c in first)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_small_space_is_drawn_whole_and_nothing_twice(sampler):
    axes = {"a": [1, 2, 3], "b": ["x", "y"]}
    found = draws(axes, 20, lambda chosen: chosen != {"a": 1, "b": "x"}, sampler=sampler)
    assert len(found) == size(axes) - 1
    assert len({tuple(sorted(c.items())) for c in found}) == len(found)
    assert draws(axes, 20, lambda chosen: False) == []


def test_heads_that_do_not_divide_the_width_are_impossible():
    recipe = load_recipe("quick")

    def can(**chosen):
        config = with_chosen(recipe, "mlp", "multi_head", chosen).run_config("mlp", "multi_head", 0)
        return possible(config)

    assert can(hidden=12, num_heads=4)
    assert not can(hidden=12, num_heads=8)


def test_a_chosen_width_is_not_matched_away():
    recipe = load_recipe("fair")
    assert recipe.run_config("mlp", "linear", 0).model_options.hidden != 64
    chosen = with_chosen(recipe, "mlp", "linear", {"hidden": 64, "lr": 0.5})
    run = chosen.run_config("mlp", "linear", 0)
    assert (run.model_options.hidden, run.train.lr) == (64, 0.5)
    assert chosen.run_config("mlp", "self", 0) == recipe.run_config("mlp", "self", 0)


def test_a_pairs_learning_rate_gives_way_to_a_later_layer(tmp_path):
    """As its width does: winners.toml with --set train.lr=… means that rate for all."""
    path = tmp_path / "winners.toml"
    path.write_text(with_chosen(load_recipe("quick"), "mlp", "self", {"lr": 0.5}).to_toml())
    assert load_recipe(path).run_config("mlp", "self", 0).train.lr == 0.5
    assert load_recipe(path, {"train.lr": 0.1}).run_config("mlp", "self", 0).train.lr == 0.1
    with pytest.raises(ValueError, match="epochs"):
        load_recipe(path, {"attention.self.mlp.epochs": 3})


def test_the_published_winners_are_the_documents():
    """One table in two recipes: what the published sweep chose."""
    ours, theirs = load_recipe("published_winners"), load_recipe("document")
    for model in model_names():
        for attention in attention_names():
            if attention == "flex":
                continue
            a, b = (recipe.run_config(model, attention, 0) for recipe in (ours, theirs))
            assert a.model_options.hidden == b.model_options.hidden
            same = {k: v for k, v in a.attention_options.items() if k in b.attention_options}
            assert same == b.attention_options
    assert (
        ours.run_config("cnn", "local", 0).train
        == load_recipe("fair").run_config("cnn", "local", 0).train
    )


def test_a_space_holds_no_number_that_cannot_be_trained_with(tmp_path):
    (tmp_path / "mine.toml").write_text("[train]\nlr = [0.1, inf]\n")
    with pytest.raises(ValueError, match=r"train\.lr = .*give finite numbers"):
        load_space(tmp_path / "mine.toml")


def test_names_of_before_are_still_read(tmp_path):
    assert load_space("seed").tables == load_space("published").tables
    old, new = load_recipe("seed_winners"), load_recipe("published_winners")
    assert old.tables == new.tables and (old.name, new.name) == (
        "seed_winners",
        "published_winners",
    )
    (tmp_path / "mine.toml").write_text('base = "seed_winners"\n')
    assert load_recipe(tmp_path / "mine.toml").tables == new.tables
