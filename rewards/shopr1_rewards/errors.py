"""Errors in the *configuration* of the reward.

    RewardsError
    ├── RecipeError        a recipe file that cannot be read or is not valid
    └── GroundTruthError   a ground truth that the recipe's action space does not describe

Errors in a *completion* are not exceptions but `FormatError` codes of the parsed completion
(`completion.py`), because a policy that writes nonsense is data, not a failure.
"""


class RewardsError(ValueError):
    """Base of every error that this package raises."""


class RecipeError(RewardsError):
    """A recipe cannot be read, has an unknown key, or holds an impossible value."""


class GroundTruthError(RewardsError):
    """The human's action is not an action of the recipe's action space.

    Attributes:
        field: the invalid key of the ground truth, or None if it is invalid as a whole.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[type["GroundTruthError"], tuple[str, str | None]]:
        return type(self), (str(self), self.field)
