"""Recipes: every number and choice of a reward in one frozen, validated TOML file.

A recipe of the package is loaded by name, your own by path:

>>> load_recipe("shop_r1").self_certainty.alpha
0.005

Every answer has the digest of its recipe, so that a logged reward can be traced to its numbers.
"""

import hashlib
import json
import tomllib
from collections.abc import Callable
from enum import StrEnum
from functools import cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from shopr1_rewards.errors import RecipeError
from shopr1_rewards.names import RECIPE_NAME, name_flaw, recipe_name_flaw
from shopr1_rewards.recipe_flaws import DARS, NUMBER, flaw, impossible
from shopr1_rewards.similarity import Tokenizer

# Strict: a quoted number or a boolean in a recipe is a mistake, not a weight. Bounded: rewards stay finite.
Weight = Annotated[float, Field(strict=True, ge=-1e9, le=1e9, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
# Beyond these bounds the logits' quotients overflow, or all distributions are uniform to rounding.
Temperature = Annotated[float, Field(strict=True, ge=1e-3, le=1e3, allow_inf_nan=False)]


class Component(StrEnum):
    """Name of a term of the reward."""

    # `terms.py` has the rule of each, and describes how to add one.

    FORMAT = "format"
    ACTION_TYPE = "action_type"
    ATTRIBUTE = "attribute"
    VALUE = "value"
    SELF_CERTAINTY = "self_certainty"


class Reading(StrEnum):
    """How to find the answer in a completion."""

    STRICT = "strict"
    TOLERANT = "tolerant"


class Which(StrEnum):
    """Choice among several valid answers in a completion. Only for tolerant reading."""

    FIRST = "first"
    LAST = "last"
    AFTER_THINKING = "after_thinking"
    """The first one after the last `</think>`; none after a `<think>` that is never closed."""


class AttributeTypes(StrEnum):
    """JSON types of the policy's attributes."""

    STRING = "string"
    """Strings only; anything else is a format error."""
    SCALAR = "scalar"
    """Numbers and booleans are their text, as written; null is as if the key were left out."""


class ActionTypes(StrEnum):
    """How the policy's action type is found in the action space."""

    EXACT = "exact"
    CASEFOLD = "casefold"
    """In upper or lower case: `Click` is `click`."""


class OnFlaw(StrEnum):
    """Effect of a flaw in a well-formed answer."""

    ACCEPT = "accept"
    """A missing part earns nothing; the format stays valid."""
    REJECT = "reject"
    """The format is invalid."""


class Threshold(StrEnum):
    """Whether a similarity equal to the threshold passes."""

    EXCLUSIVE = "exclusive"
    INCLUSIVE = "inclusive"


class Divergence(StrEnum):
    """Self-certainty of a token, in nats (`eq3`: nats / V)."""

    KL_U_P = "kl_u_p"
    KL_P_U = "kl_p_u"
    EQ3 = "eq3"


class SpanChoice(StrEnum):
    """Tokens over which self-certainty is averaged."""

    RATIONALE = "rationale"
    COMPLETION = "completion"


class Position(StrEnum):
    """Distribution that belongs to a token."""

    PREDICT = "predict"
    """The distribution that predicts the token from everything before it."""
    SHIFTED = "shifted"
    """The next distribution, as in Kang et al.'s and open-r1-intuitor's code."""


class Vocabulary(StrEnum):
    """Definition of V."""

    HEAD = "head"
    """All rows of the language-model head."""
    TOKENIZER = "tokenizer"
    """The tokenizer's tokens, without padding rows of the head."""


def _checked(find_flaw: Callable[[str], str | None]) -> AfterValidator:
    def check(name: str) -> str:
        if message := find_flaw(name):
            raise PydanticCustomError("name", "{message}", {"message": message})
        return name

    return AfterValidator(check)


Name = Annotated[str, _checked(name_flaw)]
"""Name of an action type or attribute."""
RecipeName = Annotated[
    str, _checked(recipe_name_flaw), Field(json_schema_extra={"pattern": f"^{RECIPE_NAME}$"})
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FormatRecipe(_Part):
    """The format reward and its conditions."""

    reward: Weight
    reading: Reading = Reading.STRICT
    which: Which = Which.FIRST
    attribute_types: AttributeTypes = AttributeTypes.STRING
    action_types: ActionTypes = ActionTypes.EXACT
    unknown_action_type: OnFlaw = OnFlaw.ACCEPT
    missing_attribute: OnFlaw = OnFlaw.ACCEPT
    extra_key: OnFlaw = OnFlaw.ACCEPT

    @model_validator(mode="after")
    def _check_which(self) -> Self:
        if self.reading is Reading.STRICT and self.which is not Which.FIRST:
            raise impossible(f"which = {self.which.value!r} requires reading = 'tolerant'")
        return self


_LATER_FORMAT_OPTIONS = {
    "which": Which.FIRST,
    "attribute_types": AttributeTypes.STRING,
    "action_types": ActionTypes.EXACT,
}


_INCLUSIVE = Threshold.INCLUSIVE  # see `actions.py`


class SimilarityRecipe(_Part):
    """Comparison of attribute values."""

    tokenizer: Tokenizer = Tokenizer.UNICODE
    threshold: Fraction = 0.75
    threshold_is: Threshold = Threshold.EXCLUSIVE

    @model_validator(mode="after")
    def _check_threshold(self) -> Self:
        if self.thresholded(1.0) == 0:
            raise impossible(
                "nothing exceeds threshold = 1; threshold_is = 'inclusive' asks for equal tokens"
            )
        return self

    def thresholded(self, similarity: float) -> float:
        """R(x): the similarity if it passes the threshold, else 0."""
        inclusive = self.threshold_is is _INCLUSIVE
        passes = similarity >= self.threshold if inclusive else similarity > self.threshold
        return similarity if passes else 0.0


class SelfCertaintyRecipe(_Part):
    """Definition and weight of self-certainty. `alpha = 0` turns the policy's forward off."""

    alpha: Weight
    divergence: Divergence = Divergence.KL_U_P
    span: SpanChoice = SpanChoice.RATIONALE
    position: Position = Position.PREDICT
    temperature: Temperature = 1.0
    vocabulary: Vocabulary = Vocabulary.HEAD


ValueWeight = Annotated[
    Annotated[Weight, Tag(NUMBER)] | Annotated[Literal["dars"], Tag(DARS)],
    Discriminator(lambda value: DARS if isinstance(value, str) else NUMBER),
]


class AttributeRecipe(_Part):
    """Reward of an attribute: `presence` if it is not empty, plus `value · R(x)`."""

    presence: Weight = 0.0
    value: ValueWeight = 0.0
    """`"dars"` for the long value, whose weight is the action space's `dars`."""


class ActionTypeRecipe(_Part):
    """Reward of an action type, and its attributes. The human's action has all of them."""

    reward: Weight
    attributes: dict[Name, AttributeRecipe] = {}

    @field_validator("attributes")
    @classmethod
    def _type_is_taken(cls, attributes: dict[str, AttributeRecipe]) -> dict[str, AttributeRecipe]:
        if "type" in attributes:
            raise impossible("'type' names the action's type and cannot be an attribute")
        return attributes


class ActionSpace(_Part):
    """The possible actions."""

    dars: Weight
    types: Annotated[dict[Name, ActionTypeRecipe], Field(min_length=1)]

    def find_type(self, written: str, types: ActionTypes) -> str | None:
        """The name of the type that the policy wrote, or None if there is no such type."""
        if written in self.types:
            return written
        if types is ActionTypes.EXACT:
            return None
        folded = written.casefold()
        return next((name for name in self.types if name.casefold() == folded), None)

    def value_weight(self, attribute: AttributeRecipe) -> float:
        return self.dars if attribute.value == "dars" else attribute.value

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Every attribute of any type, in the order of the recipe."""
        names = (name for action_type in self.types.values() for name in action_type.attributes)
        return tuple(dict.fromkeys(names))


def _check_unique(components: tuple[Component, ...]) -> tuple[Component, ...]:
    if len(set(components)) < len(components):
        raise impossible("a component is listed twice")
    return components


Components = Annotated[tuple[Component, ...], Field(min_length=1), AfterValidator(_check_unique)]
_SHOP_R1 = (
    Component.FORMAT,
    Component.ACTION_TYPE,
    Component.ATTRIBUTE,
    Component.VALUE,
    Component.SELF_CERTAINTY,
)
"""Listed one by one: a component that is added later is not one of Shop-R1, nor of recipes without a list."""


class Recipe(_Part):
    """A complete reward. Frozen; `recipes/shop_r1.toml` explains each number."""

    name: RecipeName
    source: str = ""
    components: Components = _SHOP_R1
    """The terms of the reward, in the order in which they are added and shown."""
    format: FormatRecipe
    similarity: SimilarityRecipe = SimilarityRecipe()
    self_certainty: SelfCertaintyRecipe
    action_space: ActionSpace

    @model_validator(mode="after")
    def _check_types(self) -> Self:
        folded = {name.casefold() for name in self.action_space.types}
        if self.format.action_types is ActionTypes.CASEFOLD and len(folded) < len(self.action_space.types):
            raise impossible(
                "format.action_types = 'casefold': two names of action_space.types are equal then"
            )
        return self

    @cached_property
    def component_names(self) -> tuple[str, ...]:
        """Components as plain strings, whose hash is fast: a key for every rollout."""
        return tuple(name.value for name in self.components)

    @property
    def digest(self) -> str:
        """`sha256:` of the recipe's canonical JSON, defaults filled in, without `source`.

        Without later options that have their defaults, too: recipes keep the digests that they had before.
        """
        content = self.model_dump(mode="json", exclude={"source"})
        if self.components == _SHOP_R1:
            del content["components"]
        for key, default in _LATER_FORMAT_OPTIONS.items():
            if content["format"][key] == default:
                del content["format"][key]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def recipe_names() -> tuple[str, ...]:
    """Names of the package's recipes."""
    files = _shipped().iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def load_recipe(name_or_path: str) -> Recipe:
    """The package's recipe of this name, or the recipe in this TOML file.

    Raises:
        RecipeError: there is no such recipe, or it is invalid; the message names file and key.
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
        raise RecipeError(f"{name_or_path}: not UTF-8 text: {error}") from error
    except (OSError, ValueError) as error:  # not readable; not a valid file name
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"the recipe {name_or_path!r} cannot be read: {reason}") from error


def parse_recipe(toml: str, origin: str = "recipe") -> Recipe:
    """A recipe from TOML text; error messages begin with `origin`.

    Raises:
        RecipeError: not TOML, an unknown or missing key, or an impossible value.
    """
    try:
        return Recipe.model_validate(tomllib.loads(toml.removeprefix("\ufeff")))  # a byte order mark
    except ValidationError as error:
        flaws = "; ".join(flaw(details) for details in error.errors())
        raise RecipeError(f"{origin}: {flaws}") from error
    except RecursionError:
        raise RecipeError(f"{origin}: not a recipe: nested too deeply") from None
    except ValueError as error:  # also of an integer with thousands of digits
        raise RecipeError(f"{origin}: not TOML: {error}") from error


def _shipped() -> Traversable:
    return resources.files("shopr1_rewards") / "recipes"
