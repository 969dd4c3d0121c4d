"""Fuzzes the parsing of labels: a label is valid, or raises `LabelError` with a message."""

import json
import sys
from typing import Any

import atheris

with atheris.instrument_imports(include=["shopr1_rewards", "shopr1_service.dialects.ground_truth"]):
    from shopr1_rewards import read_ground_truth
    from shopr1_service.dialects.ground_truth import LabelError, is_missing, parse_label

from shopr1_service.scoring.recipe_book import RecipeBook
from shopr1_service.settings import Settings
from tests.integration.ops.fuzz.harness import fuzz
from tests.support.http import CLICK, SEARCH, TERMINATE

RECIPES = RecipeBook(Settings().recipe)
SEEDS: tuple[Any, ...] = (
    TERMINATE,
    CLICK,
    json.dumps(SEARCH),
    {"ground_truth": CLICK, "recipe": "shop_r1"},
    json.dumps({"ground_truth": json.dumps(SEARCH), "recipe": None}),
    {"ground_truth": [], "recipe": {}},
    {"type": "click", "name": "\ud800"},
    {"type": "scroll"},
    None,
    "",
)


def check(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    check_label(text)
    try:
        label = json.loads(data)
    except (ValueError, RecursionError):
        return
    check_label(label)


def check_label(label: object) -> None:
    """Assert that a parsed label gives the same action when it is parsed again."""
    assert isinstance(is_missing(label), bool)
    try:
        read = parse_label(label, RECIPES)
    except LabelError as error:
        check_message(error)
        return
    again = parse_label({"ground_truth": read.truth, "recipe": read.recipe}, RECIPES)
    assert again == read
    check_truth(read.truth)


def check_message(error: LabelError) -> None:
    """Assert that the message can be sent in a response."""
    assert str(error).encode()
    error.path.encode()


def check_truth(truth: str) -> None:
    action = read_ground_truth(truth, RECIPES.default)
    assert read_ground_truth(action.to_dict(), RECIPES.default) == action


def main() -> int:
    fuzz(check, [json.dumps(seed).encode() for seed in SEEDS])
    return 0


if __name__ == "__main__":
    sys.exit(main())
