"""Several seeds of a small variant, trained at once."""

from safetensors.torch import load_file
from small_training import SMALL, TIMES, split

from tab.data.load import Dataset
from tab.recipe.recipe import load_recipe
from tab.train.together import train_seeds


def tiny() -> Dataset:
    classes = tuple("abcdefghij")
    return Dataset("tiny", classes, split(100, 1), split(20, 2), "made for tests", "0123")


def configs_of(model, attention, count=2, recipe="fair", **overrides):
    given = {"train.epochs": 2, "data.validation": 20, "train.batch_size": 20}
    given |= {key.replace("__", "."): value for key, value in overrides.items()}
    recipe = load_recipe(recipe, {**SMALL, **given})
    return [recipe.run_config(model, attention, seed) for seed in range(count)]


def together(configs, dataset, out, **options):
    return train_seeds(configs, dataset, [out / c.id for c in configs], **options)


def saved(out, config):
    return load_file(out / config.id / "model.safetensors")


def numbers(outcome):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in outcome.rows]
