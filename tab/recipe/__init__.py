"""Recipes: how a comparison trains its models, and how their sizes are matched."""

from .recipe import Recipe, load_recipe, recipe_names

__all__ = ["Recipe", "load_recipe", "recipe_names"]
