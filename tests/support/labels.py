"""Valid and invalid forms of a label."""

import json
from typing import Any

from tests.support.http import (
    CLICK,
    SEARCH,
)

NESTED = {"ground_truth": CLICK, "recipe": "shop_r1"}


FORMS: dict[str, Any] = {
    "object": CLICK,
    "string": json.dumps(CLICK),
    "nested": NESTED,
    "nested in a string": json.dumps(NESTED),
    "string in an object": {"ground_truth": json.dumps(CLICK)},
    "string in a string": json.dumps({"ground_truth": json.dumps(CLICK), "recipe": None}),
    "with more around it": {**NESTED, "session": "7"},
    "with the same around it": {**NESTED, **CLICK},
    "with another type around it": {**NESTED, "type": "shopping", "name": "row 7"},
    "with more in it": {**CLICK, "url": "https://shop.example"},
    "with the keys of other actions": {**CLICK, "text": None},
    "with the keys of nested labels": {**CLICK, "ground_truth": None, "recipe": None},
    "nested, with the keys of an action": {**NESTED, "type": None, "name": None},
}


WRONG: dict[str, tuple[Any, str]] = {
    "number": (7, ""),
    "truth value": (True, ""),
    "list": ([CLICK], ""),
    "word": ("click", ""),
    "blank": (" ", ""),
    "list in a string": (json.dumps([CLICK]), ""),
    "null in a string": ("null", ""),
    "no type": ({"name": "x"}, ".type"),
    "unknown type": ({"type": "scroll"}, ".type"),
    "no name": ({"type": "click"}, ".name"),
    "no name in a string": ('{"type": "click"}', ""),
    "a key twice": ('{"type": "terminate", "type": "terminate"}', ""),
    "half a pair": ({"type": "click", "name": "\ud83d"}, ".name"),
    "nothing nested": ({"ground_truth": None}, ".ground_truth"),
    "a number nested": ({"ground_truth": 1}, ".ground_truth"),
    "a word nested": ({"ground_truth": "click"}, ".ground_truth"),
    "no name nested": ({"ground_truth": {"type": "click"}}, ".ground_truth.name"),
    "no name nested in a string": (json.dumps({"ground_truth": {"type": "click"}}), ""),
    "empty name": ({"type": "click", "name": ""}, ".name"),
    "empty name nested": ({"ground_truth": {"type": "click", "name": ""}}, ".ground_truth.name"),
    "an action around another": ({**SEARCH, "ground_truth": CLICK}, ""),
    "an action around another in a string": (json.dumps({**SEARCH, "ground_truth": CLICK}), ""),
    "unknown recipe": ({"ground_truth": CLICK, "recipe": "nope"}, ".recipe"),
    "a recipe that is no name": ({"ground_truth": CLICK, "recipe": ["shop_r1"]}, ".recipe"),
}
