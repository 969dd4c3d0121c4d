import copy
import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from shopr1_rewards import Recipe, RecipeError, load_recipe, parse_recipe, recipe_names
from shopr1_rewards.recipe import SimilarityRecipe, Threshold, Which
from tests.support.completions import SHOP_R1

TOML = (resources.files("shopr1_rewards") / "recipes" / "shop_r1.toml").read_text("utf-8")


def edited(old: str, new: str) -> str:
    """The shipped recipe with one passage replaced."""
    assert TOML.count(old) == 1, old
    return TOML.replace(old, new)


# --- the shipped recipe -----------------------------------------------------------------------------


def test_every_number_and_choice_of_shop_r1() -> None:
    assert SHOP_R1.model_dump(mode="json", exclude={"source"}) == {
        "name": "shop_r1",
        "components": ["format", "action_type", "attribute", "value", "self_certainty"],
        "format": {
            "reward": 0.5,
            "reading": "strict",
            "which": "first",
            "attribute_types": "string",
            "action_types": "exact",
            "unknown_action_type": "accept",
            "missing_attribute": "accept",
            "extra_key": "accept",
        },
        "similarity": {"tokenizer": "unicode", "threshold": 0.75, "threshold_is": "exclusive"},
        "self_certainty": {
            "alpha": 0.005,
            "divergence": "kl_u_p",
            "span": "rationale",
            "position": "predict",
            "temperature": 1.0,
            "vocabulary": "head",
        },
        "action_space": {
            "dars": 1000.0,
            "types": {
                "terminate": {"reward": 0.3, "attributes": {}},
                "click": {"reward": 0.3, "attributes": {"name": {"presence": 0.2, "value": "dars"}}},
                "type_and_submit": {
                    "reward": 0.3,
                    "attributes": {
                        "name": {"presence": 0.1, "value": 0.1},
                        "text": {"presence": 0.1, "value": "dars"},
                    },
                },
            },
        },
    }


def test_value_weights_of_shop_r1() -> None:
    space = SHOP_R1.action_space
    weights = {
        (kind, name): space.value_weight(attribute)
        for kind, action_type in space.types.items()
        for name, attribute in action_type.attributes.items()
    }
    assert weights == {
        ("click", "name"): 1000.0,
        ("type_and_submit", "name"): 0.1,
        ("type_and_submit", "text"): 1000.0,
    }


def test_attribute_names_are_unique_and_in_order() -> None:
    assert SHOP_R1.action_space.attribute_names == ("name", "text")


MINIMAL = """
name = "minimal"
format.reward = 1
self_certainty.alpha = 0
[action_space]
dars = 10
[action_space.types.click]
reward = 2
attributes.name = {}
"""


def test_defaults() -> None:
    recipe = parse_recipe(MINIMAL)
    shop_r1 = SHOP_R1.model_dump(mode="json")
    assert recipe.source == ""
    assert recipe.model_dump(mode="json") == {
        "name": "minimal",
        "source": "",
        "components": shop_r1["components"],
        "format": {**shop_r1["format"], "reward": 1.0},
        "similarity": shop_r1["similarity"],
        "self_certainty": {**shop_r1["self_certainty"], "alpha": 0.0},
        "action_space": {
            "dars": 10.0,
            "types": {"click": {"reward": 2.0, "attributes": {"name": {"presence": 0.0, "value": 0.0}}}},
        },
    }


@pytest.mark.parametrize(
    ("threshold_is", "similarity", "expected"),
    [
        (Threshold.EXCLUSIVE, 0.74, 0.0),
        (Threshold.EXCLUSIVE, 0.75, 0.0),
        (Threshold.EXCLUSIVE, 0.76, 0.76),
        (Threshold.INCLUSIVE, 0.74, 0.0),
        (Threshold.INCLUSIVE, 0.75, 0.75),
        (Threshold.INCLUSIVE, 0.76, 0.76),
    ],
)
def test_threshold(threshold_is: Threshold, similarity: float, expected: float) -> None:
    rules = SimilarityRecipe(threshold=0.75, threshold_is=threshold_is)
    assert rules.thresholded(similarity) == expected


# --- refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('name = "shop_r1"', 'name = "shop_r1"\nbonus = 1', "bonus"),
        ('name = "shop_r1"', 'name = "shop_r1"\nfloat = 1', "float"),
        ("[format]", "[format]\nbonus = 1", "format.bonus"),
        ("[similarity]", "[similarity]\nbonus = 1", "similarity.bonus"),
        ("[self_certainty]", "[self_certainty]\ntemprature = 0.6", "self_certainty.temprature"),
        ("[action_space]", "[action_space]\nbonus = 1", "action_space.bonus"),
        (
            "[action_space.types.click]",
            "[action_space.types.click]\nbonus = 1",
            "action_space.types.click.bonus",
        ),
        (
            "{ presence = 0.2,",
            "{ bonus = 1, presence = 0.2,",
            "action_space.types.click.attributes.name.bonus",
        ),
    ],
)
def test_unknown_key_is_refused_and_named(old: str, new: str, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(edited(old, new), "mine.toml")
    assert str(caught.value) == f"mine.toml: unknown key {key!r}"


@pytest.mark.parametrize(
    ("old", "new", "key", "value"),
    [
        ("reward = 0.5", "reward = inf", "format.reward", "inf"),
        ("reward = 0.5", "reward = nan", "format.reward", "nan"),
        ("reward = 0.5", "reward = [0.5]", "format.reward", "[0.5]"),
        ("reward = 0.5", "reward = true", "format.reward", "True"),
        ("reward = 0.5", 'reward = "0.5"', "format.reward", "'0.5'"),
        ('reading = "strict"', 'reading = "Strict"', "format.reading", "'Strict'"),
        ('which = "first"', 'which = "best"', "format.which", "'best'"),
        (
            'attribute_types = "string"',
            'attribute_types = "any"',
            "format.attribute_types",
            "'any'",
        ),
        ('action_types = "exact"', 'action_types = "Exact"', "format.action_types", "'Exact'"),
        (
            'unknown_action_type = "accept"',
            'unknown_action_type = "warn"',
            "format.unknown_action_type",
            "'warn'",
        ),
        ('missing_attribute = "accept"', "missing_attribute = 0", "format.missing_attribute", "0"),
        ('extra_key = "accept"', "extra_key = true", "format.extra_key", "True"),
        ('tokenizer = "unicode"', 'tokenizer = "bert"', "similarity.tokenizer", "'bert'"),
        ("threshold = 0.75", "threshold = -0.01", "similarity.threshold", "-0.01"),
        ("threshold = 0.75", "threshold = 1.01", "similarity.threshold", "1.01"),
        ("threshold = 0.75", "threshold = true", "similarity.threshold", "True"),
        ("threshold = 0.75", "threshold = nan", "similarity.threshold", "nan"),
        ('threshold_is = "exclusive"', 'threshold_is = ">"', "similarity.threshold_is", "'>'"),
        ("alpha = 0.005", "alpha = -inf", "self_certainty.alpha", "-inf"),
        ("alpha = 0.005", "alpha = true", "self_certainty.alpha", "True"),
        ('divergence = "kl_u_p"', 'divergence = "js"', "self_certainty.divergence", "'js'"),
        ('span = "rationale"', 'span = "action"', "self_certainty.span", "'action'"),
        ('position = "predict"', 'position = "next"', "self_certainty.position", "'next'"),
        ("temperature = 1.0", "temperature = 0", "self_certainty.temperature", "0"),
        ("temperature = 1.0", "temperature = -1.0", "self_certainty.temperature", "-1.0"),
        ("temperature = 1.0", "temperature = true", "self_certainty.temperature", "True"),
        ("temperature = 1.0", "temperature = inf", "self_certainty.temperature", "inf"),
        ("temperature = 1.0", "temperature = nan", "self_certainty.temperature", "nan"),
        # Quotients of logits overflow, or every distribution is uniform.
        ("temperature = 1.0", "temperature = 1e-300", "self_certainty.temperature", "1e-300"),
        ("temperature = 1.0", "temperature = 9e-4", "self_certainty.temperature", "0.0009"),
        ("temperature = 1.0", "temperature = 1001", "self_certainty.temperature", "1001"),
        ("temperature = 1.0", "temperature = 1e300", "self_certainty.temperature", "1e+300"),
        ("alpha = 0.005", "alpha = 1e400", "self_certainty.alpha", "inf"),
        ("alpha = 0.005", "alpha = -1.1e9", "self_certainty.alpha", "-1100000000.0"),
        ("dars = 1000.0", "dars = 1e308", "action_space.dars", "1e+308"),
        ("dars = 1000.0", "dars = 9223372036854775808", "action_space.dars", "9223372036854775808"),
        ('vocabulary = "head"', 'vocabulary = "all"', "self_certainty.vocabulary", "'all'"),
        ("dars = 1000.0", "dars = inf", "action_space.dars", "inf"),
        ("dars = 1000.0", 'dars = "high"', "action_space.dars", "'high'"),
        ("presence = 0.2", "presence = nan", "action_space.types.click.attributes.name.presence", "nan"),
        ("value = 0.1", "value = inf", "action_space.types.type_and_submit.attributes.name.value", "inf"),
        (
            "value = 0.1",
            'value = "Dars"',
            "action_space.types.type_and_submit.attributes.name.value",
            "'Dars'",
        ),
        ("value = 0.1", "value = true", "action_space.types.type_and_submit.attributes.name.value", "True"),
        ('name = "shop_r1"', 'name = ""', "name", "''"),
        ('name = "shop_r1"', 'name = "../up"', "name", "'../up'"),
        ('name = "shop_r1"', 'name = "two words"', "name", "'two words'"),
        ('name = "shop_r1"', 'name = "line\\n"', "name", "'line\\n'"),
        ('name = "shop_r1"', "name = 1", "name", "1"),
    ],
)
def test_impossible_value_is_refused_with_key_and_value(old: str, new: str, key: str, value: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(edited(old, new), "mine.toml")
    message = str(caught.value)
    assert message.startswith(f"mine.toml: {key}: ")
    assert message.endswith(f"(got {value})")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("", "missing key 'name'"),
        (edited("reward = 0.5", ""), "missing key 'format.reward'"),
        (edited("alpha = 0.005", ""), "missing key 'self_certainty.alpha'"),
        (edited("dars = 1000.0", ""), "missing key 'action_space.dars'"),
        (
            edited("[action_space.types.terminate]\nreward = 0.3", "[action_space.types.terminate]"),
            "missing key 'action_space.types.terminate.reward'",
        ),
        (
            TOML[: TOML.index("[action_space.types.")] + "types = {}",
            "action_space.types: must not be empty (got {})",
        ),
        (TOML[: TOML.index("[action_space.types.")], "missing key 'action_space.types'"),
        (
            edited("attributes.text", "attributes.type"),
            "action_space.types.type_and_submit.attributes: 'type' names the action's type",
        ),
        ("name =", "not TOML: "),
        (TOML + "[format]", "not TOML: "),
    ],
)
def test_recipe_that_is_none(toml: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(toml, "mine.toml")
    assert str(caught.value).startswith(f"mine.toml: {message}")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "threshold = 0.75",
            "threshold = 1.0",
            "similarity: nothing exceeds threshold = 1; threshold_is = 'inclusive' asks for equal tokens",
        ),
        ("threshold = 0.75", "threshold = 1", "similarity: nothing exceeds threshold = 1"),
        ('which = "first"', 'which = "last"', "format: which = 'last' requires reading = 'tolerant'"),
        (
            'which = "first"',
            'which = "after_thinking"',
            "format: which = 'after_thinking' requires reading = 'tolerant'",
        ),
        (
            "attributes.text",
            'attributes.""',
            'action_space.types.type_and_submit.attributes."": must not be blank',
        ),
        (
            "attributes.text",
            'attributes." \\t"',
            r'action_space.types.type_and_submit.attributes." \t": must not be blank',
        ),
        ("types.terminate", 'types.""', 'action_space.types."": must not be blank'),
        ("types.terminate", 'types." "', 'action_space.types." ": must not be blank'),
        ("types.terminate", 'types."end\\u200b"', r'action_space.types."end\u200b": has the invisible char'),
        ("types.terminate", 'types." end"', 'action_space.types." end": must not begin or end with a space'),
        (
            "attributes.text",
            'attributes."te\u00adxt"',
            r'action_space.types.type_and_submit.attributes."te\u00adxt": has the invisible character U+00AD',
        ),
    ],
)
def test_recipe_that_cannot_work_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(edited(old, new), "mine.toml")
    assert str(caught.value).startswith(f"mine.toml: {message}")


def test_types_that_only_differ_in_case_need_exact_types() -> None:
    toml = edited("types.terminate", "types.CLICK")
    assert "CLICK" in parse_recipe(toml).action_space.types
    with pytest.raises(
        RecipeError, match=r"^mine: format\.action_types = 'casefold': two names of action_spac"
    ):
        parse_recipe(toml.replace('action_types = "exact"', 'action_types = "casefold"'), "mine")


@pytest.mark.parametrize("threshold", ["0", "5e-324", "0.9999999999999999"])
@pytest.mark.parametrize("is_", ["exclusive", "inclusive"])
def test_every_other_threshold_can_be_passed(threshold: str, is_: str) -> None:
    toml = edited("threshold = 0.75", f"threshold = {threshold}").replace('"exclusive"', f'"{is_}"')
    assert parse_recipe(toml).similarity.thresholded(1.0) == 1.0


DIGITS = {
    "decimal": ("1" * 5000, "not TOML: Exceeds the limit"),
    "hexadecimal": ("0x" + "f" * 5000, "action_space.dars: "),
    "float": ("1" * 5000 + ".0", "action_space.dars: "),
    "400 digits": ("1" * 400, "action_space.dars: "),
    "nested": ("[" * 900 + "]" * 900, ""),
    "nested, a little": ("[" * 50 + "]" * 50, "action_space.dars: "),
    "nested tables": ("{a=" * 900 + "1" + "}" * 900, ""),
    "date": ("2026-05-01", "action_space.dars: "),
    "time": ("2026-05-01T00:00:00Z", "action_space.dars: "),
    "long string": ('"' + "x" * 10_000 + '"', "action_space.dars: "),
}


@pytest.mark.parametrize(("value", "message"), DIGITS.values(), ids=list(DIGITS))
def test_values_beyond_every_limit(value: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(edited("dars = 1000.0", f"dars = {value}"), "mine.toml")
    assert str(caught.value).startswith(f"mine.toml: {message}")
    assert len(str(caught.value)) < 500


def test_every_flaw_is_named() -> None:
    toml = edited("alpha = 0.005", "alpha = inf").replace("[format]", "[format]\nbonus = 1")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(toml)
    assert "unknown key 'format.bonus'; self_certainty.alpha: " in str(caught.value)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ('["format", "politeness"]', "components[1]: must be 'format', 'action_type'"),
        ('["format", "value", "format"]', "components: a component is listed twice"),
        ("[]", "components: must not be empty"),
        ('"format"', "components: must be a list"),
    ],
)
def test_components_that_are_none(components: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse_recipe(re.sub("components = .*", f"components = {components}", TOML))


# --- frozen -----------------------------------------------------------------------------------------

PARTS: dict[str, tuple[BaseModel, str]] = {
    "recipe": (SHOP_R1, "name"),
    "format": (SHOP_R1.format, "reward"),
    "similarity": (SHOP_R1.similarity, "threshold"),
    "self_certainty": (SHOP_R1.self_certainty, "alpha"),
    "action_space": (SHOP_R1.action_space, "dars"),
    "type": (SHOP_R1.action_space.types["click"], "reward"),
    "attribute": (SHOP_R1.action_space.types["click"].attributes["name"], "presence"),
}


@pytest.mark.parametrize(("part", "field"), PARTS.values(), ids=list(PARTS))
def test_frozen(part: BaseModel, field: str) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(part, field, 1.0)


# --- digest -----------------------------------------------------------------------------------------

# pragma: allowlist nextline secret
SHOP_R1_DIGEST = "8cdec04b30fd6bcf9d3ec57a8be623de0c95006e09b9d892d91cb64cef5e333b"
OTHER_CHOICE: dict[str, Any] = {
    "shop_r1": "other",
    "strict": "tolerant",
    "accept": "reject",
    "string": "scalar",
    "exact": "casefold",
    "unicode": "exact",
    "exclusive": "inclusive",
    "kl_u_p": "eq3",
    "rationale": "completion",
    "predict": "shifted",
    "head": "tokenizer",
    "dars": 1000.0,  # the same weight, but another recipe
}


def leaves(tree: dict[str, Any]) -> list[tuple[str, ...]]:
    paths: list[tuple[str, ...]] = []
    for key, value in tree.items():
        below = leaves(value) if isinstance(value, dict) else [()]
        paths += [(key, *path) for path in below]
    return paths


def changed(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """A copy with another number or choice at the end of `path`."""
    tree = copy.deepcopy(tree)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    value = parent[path[-1]]
    match value:
        case str():
            parent[path[-1]] = OTHER_CHOICE[value]
        case list():
            parent[path[-1]] = value[::-1]
        case _:
            parent[path[-1]] = value * (1 + 2**-52)  # one or two units in the last place
    return tree


SHIPPED: dict[str, Any] = tomllib.loads(TOML)
# `which` needs another reading; its digest has its own test.
LEAVES = [path for path in leaves(SHIPPED) if path not in (("source",), ("format", "which"))]


@pytest.mark.parametrize("path", LEAVES, ids=".".join)
def test_digest_changes_with_every_number_and_choice(path: tuple[str, ...]) -> None:
    assert Recipe.model_validate(changed(SHIPPED, path)).digest != SHOP_R1.digest


def test_no_two_changes_have_the_same_digest() -> None:
    digests = {Recipe.model_validate(changed(SHIPPED, path)).digest for path in LEAVES}
    # 1 name, 1 order of components, 7 of format, 3 of similarity, 6 of self-certainty, dars, and of the
    # types 1 + 3 + 5.
    assert len(digests) == len(LEAVES) == 28


def test_digest_changes_with_which() -> None:
    tolerant = edited('reading = "strict"', 'reading = "tolerant"')
    tomls = [tolerant.replace('which = "first"', f'which = "{which.value}"') for which in Which]
    assert len({parse_recipe(toml).digest for toml in tomls}) == 3


def test_digest_of_shop_r1_is_that_of_recipes_without_later_options() -> None:
    later = ("which", "attribute_types", "action_types")
    without = "".join(line for line in TOML.splitlines(True) if not line.startswith(later))
    assert parse_recipe(without).digest == SHOP_R1.digest


def test_digest_of_shop_r1_is_that_of_recipes_without_a_list_of_components() -> None:
    without = "".join(line for line in TOML.splitlines(True) if not line.startswith("components"))
    assert parse_recipe(without).digest == SHOP_R1.digest == f"sha256:{SHOP_R1_DIGEST}"


def test_digest_changes_with_types_and_attributes() -> None:
    without_attribute = edited('attributes.text = { presence = 0.1, value = "dars" }', "")
    renamed_attribute = edited("attributes.text", "attributes.query")
    renamed_type = edited("types.terminate", "types.stop")
    tomls = (TOML, without_attribute, renamed_attribute, renamed_type)
    assert len({parse_recipe(toml).digest for toml in tomls}) == len(tomls)


def backwards(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {key: backwards(value) for key, value in reversed(tree.items())}


SAME = {
    "comments": "# mine\n" + TOML.replace("#", "# really:"),
    "line ends": TOML.replace("\n", "\r\n"),
    "source": edited("Table 1", "Table 2"),
    "no source": TOML.replace("source", "# source", 1),
    "integer for a whole number": edited("dars = 1000.0", "dars = 1000"),
    "number written otherwise": edited("dars = 1000.0", "dars = 1e3"),
    "omitted defaults": edited("temperature = 1.0", "").replace('tokenizer = "unicode"', ""),
    "byte order mark": "\ufeff" + TOML,
    "omitted section": TOML[: TOML.index("[similarity]")] + TOML[TOML.index("[self_certainty]") :],
}


@pytest.mark.parametrize("toml", SAME.values(), ids=list(SAME))
def test_digest_does_not_change_with_the_writing(toml: str) -> None:
    assert parse_recipe(toml).digest == SHOP_R1.digest


def test_digest_does_not_change_with_the_order_of_keys() -> None:
    assert Recipe.model_validate(backwards(SHIPPED)).digest == SHOP_R1.digest


def test_changed_copy_has_its_own_digest() -> None:
    recipe = load_recipe("shop_r1")
    digest = recipe.digest  # read before the copy is made
    changed_copy = recipe.model_copy(
        update={"action_space": recipe.action_space.model_copy(update={"dars": 1.0})}
    )
    assert changed_copy.digest != digest


def test_digest_is_the_one_on_record() -> None:
    # Logged rewards name it: when this changes, either a default changed or how digests are made.
    assert SHOP_R1.digest == "sha256:8cdec04b30fd6bcf9d3ec57a8be623de0c95006e09b9d892d91cb64cef5e333b"


# --- where recipes come from ------------------------------------------------------------------------


def test_recipe_names() -> None:
    assert "shop_r1" in recipe_names()
    assert list(recipe_names()) == sorted(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_go_by_their_own_names(name: str) -> None:
    assert load_recipe(name).name == name


def test_recipe_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(edited("alpha = 0.005", "alpha = 0.01  # größer"), "utf-8")
    assert load_recipe(str(path)).self_certainty.alpha == 0.01


def test_recipe_from_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TOML, "utf-8-sig")
    assert load_recipe(str(path)) == SHOP_R1


def test_flaw_in_a_file_is_reported_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("x = 1", "utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["shop_r2", "missing/mine.toml", "shop_r1.toml", "SHOP_R1"])
def test_missing_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = ", ".join(recipe_names())
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert str(caught.value) == f"no recipe {name!r}: neither a file nor one of {known}"


@pytest.mark.parametrize("name", ["", ".", "x" * 10_000, "nul\0", "half \ud800"])
def test_name_that_cannot_be_a_file(name: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(name)


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"mine\.toml: not UTF-8 text: "):
        load_recipe(str(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, reason in ((str(tmp_path), "Is a directory"), ("a\0b", "embedded null byte")):
        with pytest.raises(RecipeError) as caught:
            load_recipe(name)
        assert str(caught.value) == f"the recipe {name!r} cannot be read: {reason}"
    binary = tmp_path / "mine.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="^" + re.escape(f"{binary}: not UTF-8 text: ")):
        load_recipe(str(binary))
