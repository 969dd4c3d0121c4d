"""The time of a key check reveals nothing about the keys."""

import random
import statistics
import time

import pytest

from shopr1_service.http.api_keys import ApiKeys
from shopr1_service.settings import Settings

pytestmark = pytest.mark.timeout(600)

RIGHT = "0123456789abcdef" * 4
GUESSES = {
    "right": RIGHT,
    "right, once more": RIGHT,  # the spread of two medians of the same
    "wrong from the first character": "x" + RIGHT[1:],
    "wrong in the last character": RIGHT[:-1] + "x",
    "wrong altogether": "x" * len(RIGHT),
}
NUM_TURNS = 40_000
REVEALING_NS = 50.0
"""A comparison that stops at the first difference takes 1 ns per character: 64 ns for these keys."""


def test_right_and_wrong_keys_take_the_same_time() -> None:
    others = tuple(f"another-{i:056d}" for i in range(3))
    keys = ApiKeys.of(Settings(api_keys=(others[0], RIGHT, *others[1:])))  # type: ignore[arg-type]
    durations_ns: dict[str, list[int]] = {name: [] for name in GUESSES}
    names, randomly = list(GUESSES), random.Random(0)
    for _ in range(NUM_TURNS):
        randomly.shuffle(names)  # so that interference affects all of them alike
        for name in names:
            given = GUESSES[name].encode()
            start_ns = time.perf_counter_ns()
            keys.scopes(given)
            durations_ns[name].append(time.perf_counter_ns() - start_ns)
    medians = {name: statistics.median(each) for name, each in durations_ns.items()}
    print(f"\nmedians in ns: {medians}")
    assert spread(medians, "wrong") < REVEALING_NS
    # A right key is no secret from its sender. It may take some nanoseconds more, because the processor
    # predicts that comparisons fail, as nine of ten do.
    assert spread(medians, "") < 2 * REVEALING_NS


def spread(medians: dict[str, float], kind: str) -> float:
    values = [value for name, value in medians.items() if name.startswith(kind)]
    return max(values) - min(values)
