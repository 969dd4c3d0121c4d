"""Completions of a policy, and slow reference implementations."""

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from shopr1_rewards import Action, Envelope, FormatError, FormatFailure, Recipe, load_recipe, parse_strict

SHOP_R1: Recipe = load_recipe("shop_r1")


def answer(action: Mapping[str, Any], rationale: str = "r", **extra: Any) -> str:
    return json.dumps({"rationale": rationale, "action": action, **extra})


def click(name: str) -> Action:
    return Action("click", {"name": name})


def type_and_submit(name: str, text: str) -> Action:
    return Action("type_and_submit", {"name": name, "text": text})


TERMINATE = Action("terminate", {})


def accepted(result: Envelope | FormatFailure) -> Envelope:
    assert isinstance(result, Envelope), result
    return result


def refused(result: object) -> FormatFailure:
    assert isinstance(result, FormatFailure), result
    return result


def verdict(result: object) -> FormatError | None:
    return result.error if isinstance(result, FormatFailure) else None


def envelope_of(action: Mapping[str, Any], **extra: Any) -> Envelope:
    return accepted(parse_strict(answer(action, **extra)))


def slow_lcs(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence, by the textbook table."""
    above = [0] * (len(right) + 1)
    for x in left:
        row = [0]
        for j, y in enumerate(right):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
        above = row
    return above[-1]


def slow_f1(left: Sequence[str], right: Sequence[str]) -> Fraction:
    """ROUGE-L F1 of two token lists, without rounding."""
    if not left or not right:
        return Fraction(0)
    return Fraction(2 * slow_lcs(left, right), len(left) + len(right))


class CountingPattern:
    """A pattern that adds up how many characters it looks at."""

    def __init__(self, pattern: Any) -> None:
        self.pattern = pattern
        self.num_chars = 0

    def finditer(self, text: str, start: int) -> Any:
        for match in self.pattern.finditer(text, start):
            # An open string is looked at up to the end.
            end = len(text) if match.group() == '"' else match.end()
            self.num_chars += end - start
            start = match.end()
            yield match
