"""Recipes: every number and choice of a reward in one frozen, validated TOML file.

A recipe that ships with the package is loaded by name, your own by path:

>>> load_recipe("shop_r1").self_certainty.alpha
0.005

The digest of a recipe stands in every answer, so that a logged reward can be traced to its numbers.
"""

import hashlib
import json
import tomllib
from enum import StrEnum
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
)
from pydantic_core import ErrorDetails

from shopr1_rewards.errors import RecipeError
from shopr1_rewards.similarity import Tokenizer

# Strict: a quoted number or a boolean in a recipe is a mistake, not a weight. Bounded: rewards stay finite.
Weight = Annotated[float, Field(strict=True, ge=-1e9, le=1e9, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Temperature = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


class Component(StrEnum):
    """Name of a term of the reward."""

    # `terms.py` has the rule of each, and says how to add one.

    FORMAT = "format"
    ACTION_TYPE = "action_type"
    ATTRIBUTE = "attribute"
    VALUE = "value"
    SELF_CERTAINTY = "self_certainty"


class Reading(StrEnum):
    """What counts as the answer in a completion."""

    STRICT = "strict"
    TOLERANT = "tolerant"


class OnFlaw(StrEnum):
    """What a flaw in a well-formed answer costs."""

    ACCEPT = "accept"
    """What is missing earns nothing; the format stays valid."""
    REJECT = "reject"
    """The format is invalid."""


class Threshold(StrEnum):
    """Whether a similarity exactly at the threshold passes."""

    EXCLUSIVE = "exclusive"
    INCLUSIVE = "inclusive"


class Divergence(StrEnum):
    """What self-certainty measures, per token, in nats (`eq3`: nats / V)."""

    KL_U_P = "kl_u_p"
    KL_P_U = "kl_p_u"
    EQ3 = "eq3"


class SpanChoice(StrEnum):
    """Which tokens self-certainty is averaged over."""

    RATIONALE = "rationale"
    COMPLETION = "completion"


class Position(StrEnum):
    """Which distribution belongs to a token."""

    PREDICT = "predict"
    """The one that predicts it, from everything before it."""
    SHIFTED = "shifted"
    """The one after it, as in Kang et al.'s and open-r1-intuitor's code."""


class Vocabulary(StrEnum):
    """What V counts."""

    HEAD = "head"
    """All rows of the language-model head."""
    TOKENIZER = "tokenizer"
    """The tokenizer's tokens: leaves out padding rows of the head."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FormatRecipe(_Part):
    """The format reward and what it asks for."""

    reward: Weight
    reading: Reading = Reading.STRICT
    unknown_action_type: OnFlaw = OnFlaw.ACCEPT
    missing_attribute: OnFlaw = OnFlaw.ACCEPT
    extra_key: OnFlaw = OnFlaw.ACCEPT


class SimilarityRecipe(_Part):
    """How attribute values are compared."""

    tokenizer: Tokenizer = Tokenizer.UNICODE
    threshold: Fraction = 0.75
    threshold_is: Threshold = Threshold.EXCLUSIVE

    def thresholded(self, similarity: float) -> float:
        """R(x): the similarity where it passes the threshold, else 0."""
        inclusive = self.threshold_is is Threshold.INCLUSIVE
        passes = similarity >= self.threshold if inclusive else similarity > self.threshold
        return similarity if passes else 0.0


class SelfCertaintyRecipe(_Part):
    """What self-certainty is and what it weighs. `alpha = 0` turns the policy's forward off."""

    alpha: Weight
    divergence: Divergence = Divergence.KL_U_P
    span: SpanChoice = SpanChoice.RATIONALE
    position: Position = Position.PREDICT
    temperature: Temperature = 1.0
    vocabulary: Vocabulary = Vocabulary.HEAD


# Tags of unions appear in pydantic's error locations; the brackets tell them from keys of the file.
_NUMBER, _DARS = "<number>", "<dars>"

ValueWeight = Annotated[
    Annotated[Weight, Tag(_NUMBER)] | Annotated[Literal["dars"], Tag(_DARS)],
    Discriminator(lambda value: _DARS if isinstance(value, str) else _NUMBER),
]


class AttributeRecipe(_Part):
    """What an attribute earns: `presence` when it is not empty, `value · R(x)` when it is alike."""

    presence: Weight = 0.0
    value: ValueWeight = 0.0
    """`"dars"` for the long value, whose weight is the action space's `dars`."""


class ActionTypeRecipe(_Part):
    """What an action of this type earns, and its attributes. The human's action has all of them."""

    reward: Weight
    attributes: dict[str, AttributeRecipe] = {}

    @field_validator("attributes")
    @classmethod
    def _type_is_taken(cls, attributes: dict[str, AttributeRecipe]) -> dict[str, AttributeRecipe]:
        if "type" in attributes:
            raise ValueError("'type' names the action's type and cannot be an attribute")
        return attributes


class ActionSpace(_Part):
    """The actions there are."""

    dars: Weight
    types: Annotated[dict[Annotated[str, Field(min_length=1)], ActionTypeRecipe], Field(min_length=1)]

    def value_weight(self, attribute: AttributeRecipe) -> float:
        return self.dars if attribute.value == "dars" else attribute.value

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Every attribute of any type, in the order of the recipe."""
        names = (name for action_type in self.types.values() for name in action_type.attributes)
        return tuple(dict.fromkeys(names))


def _check_unique(components: tuple[Component, ...]) -> tuple[Component, ...]:
    if len(set(components)) < len(components):
        raise ValueError("a component is listed twice")
    return components


Components = Annotated[tuple[Component, ...], Field(min_length=1), AfterValidator(_check_unique)]
_SHOP_R1 = tuple(Component)


class Recipe(_Part):
    """A complete reward. Frozen; see `recipes/shop_r1.toml` for what each number means."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    source: str = ""
    components: Components = _SHOP_R1
    """The terms of the reward, in the order in which they are added and shown."""
    format: FormatRecipe
    similarity: SimilarityRecipe = SimilarityRecipe()
    self_certainty: SelfCertaintyRecipe
    action_space: ActionSpace

    @property
    def digest(self) -> str:
        """`sha256:` of the recipe's canonical JSON, defaults filled in, without `source`.

        Shop-R1's components are left out: recipes had no others, and no list of them, before.
        """
        excluded = {"source", "components"} if self.components == _SHOP_R1 else {"source"}
        content = self.model_dump(mode="json", exclude=excluded)
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def recipe_names() -> tuple[str, ...]:
    """The recipes that ship with the package."""
    files = _shipped().iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def load_recipe(name_or_path: str) -> Recipe:
    """The shipped recipe of this name, or the one in this TOML file.

    Raises:
        RecipeError: there is no such recipe, or it is not valid; the message names file and key.
    """
    if name_or_path in recipe_names():
        return parse_recipe((_shipped() / f"{name_or_path}.toml").read_text("utf-8"), name_or_path)
    return parse_recipe(_read(name_or_path), name_or_path)


def _read(name_or_path: str) -> str:
    try:
        return Path(name_or_path).read_text("utf-8")
    except FileNotFoundError:
        known = ", ".join(recipe_names())
        raise RecipeError(f"no recipe {name_or_path!r}: neither a file nor one of {known}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name_or_path}: {error}") from error
    except (OSError, ValueError) as error:  # not readable; not a possible name of a file
        raise RecipeError(f"{name_or_path!r}: {error}") from error


def parse_recipe(toml: str, origin: str = "recipe") -> Recipe:
    """A recipe from TOML text; `origin` stands in error messages.

    Raises:
        RecipeError: not TOML, an unknown or missing key, or an impossible value.
    """
    try:
        return Recipe.model_validate(tomllib.loads(toml))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{origin}: not TOML: {error}") from error
    except ValidationError as error:
        flaws = "; ".join(_flaw(details) for details in error.errors())
        raise RecipeError(f"{origin}: {flaws}") from error


def _flaw(details: ErrorDetails) -> str:
    key = ".".join(str(part) for part in details["loc"] if part not in (_NUMBER, _DARS))
    if details["type"] == "extra_forbidden":
        return f"unknown key {key!r}"
    if details["type"] == "missing":
        return f"missing key {key!r}"
    return f"{key}: {details['msg']} (got {details['input']!r})"


def _shipped() -> Traversable:
    return resources.files("shopr1_rewards") / "recipes"
