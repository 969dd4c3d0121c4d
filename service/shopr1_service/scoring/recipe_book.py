"""The service's recipes: those of the package, and the default one."""

from collections.abc import Iterator

from shopr1_client.wire import RecipeRef
from shopr1_rewards import Recipe, load_recipe, recipe_names


class RecipeBook:
    """Recipes by name.

    Args:
        default: name of a package's recipe, or a TOML file, which replaces a package's recipe of the same
            name.
    """

    def __init__(self, default: str) -> None:
        self._recipes = {name: load_recipe(name) for name in recipe_names()}
        self.default = load_recipe(default)
        self._recipes[self.default.name] = self.default
        self._references = {name: reference(recipe) for name, recipe in self._recipes.items()}

    def __iter__(self) -> Iterator[Recipe]:
        return iter(self._recipes.values())

    def get(self, name: str | None) -> Recipe | None:
        """The recipe of this name; the default one for None; None if there is no such recipe."""
        return self.default if name is None else self._recipes.get(name)

    def reference(self, recipe: Recipe) -> RecipeRef:
        """Name and digest of one of these recipes, computed once."""
        return self._references[recipe.name]


def reference(recipe: Recipe) -> RecipeRef:
    """Name and digest of a recipe for an answer."""
    return RecipeRef(name=recipe.name, digest=recipe.digest)
