"""Recipes by name: those of the package, and the default one."""

from pathlib import Path

import pytest

from shopr1_rewards import RecipeError, load_recipe, recipe_names
from shopr1_service.scoring.recipe_book import RecipeBook, reference
from tests.support.http import write_recipe


def test_recipes_of_the_package() -> None:
    book = RecipeBook("shop_r1")
    assert [recipe.name for recipe in book] == list(recipe_names())
    assert book.get("shop_r1") == book.get(None) == book.default == load_recipe("shop_r1")
    assert book.get("other") is None


def test_a_file_is_the_default_beside_the_packages_recipes(tmp_path: Path) -> None:
    book = RecipeBook(write_recipe(tmp_path, ("alpha = 0.005", "alpha = 1.0")))
    assert [recipe.name for recipe in book] == [*recipe_names(), "mine"]
    assert book.get(None) == book.get("mine") == book.default
    assert book.default.self_certainty.alpha == 1.0


def test_a_file_replaces_the_packages_recipe_of_its_name(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, ("alpha = 0.005", "alpha = 1.0"), ('name = "mine"', 'name = "shop_r1"'))
    book = RecipeBook(path)
    assert [recipe.name for recipe in book] == list(recipe_names())
    assert book.get("shop_r1") == book.default != load_recipe("shop_r1")


def test_an_unknown_default_is_an_error() -> None:
    with pytest.raises(RecipeError, match="no recipe 'other'"):
        RecipeBook("other")


def test_reference() -> None:
    recipe = load_recipe("shop_r1")
    assert reference(recipe).model_dump() == {"name": "shop_r1", "digest": recipe.digest}
