"""How long it takes to look at a key says nothing about any key."""

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
    "right, once more": RIGHT,  # how far two medians of the same lie apart
    "wrong from the first character": "x" + RIGHT[1:],
    "wrong in the last character": RIGHT[:-1] + "x",
    "wrong altogether": "x" * len(RIGHT),
}
NUM_TURNS = 40_000
TELLING_NS = 50.0
"""Comparing characters one by one until they differ takes 1 ns each: 64 for those here."""


def test_right_and_wrong_keys_take_the_same_time() -> None:
    others = tuple(f"another-{i:056d}" for i in range(3))
    keys = ApiKeys.of(Settings(api_keys=(others[0], RIGHT, *others[1:])))  # type: ignore[arg-type]
    durations_ns: dict[str, list[int]] = {name: [] for name in GUESSES}
    names, randomly = list(GUESSES), random.Random(0)
    for _ in range(NUM_TURNS):
        randomly.shuffle(names)  # whatever the machine does meanwhile, it does to all of them
        for name in names:
            given = GUESSES[name].encode()
            start_ns = time.perf_counter_ns()
            keys.scopes(given)
            durations_ns[name].append(time.perf_counter_ns() - start_ns)
    medians = {name: statistics.median(each) for name, each in durations_ns.items()}
    print(f"\nmedians in ns: {medians}")
    assert spread(medians, "wrong") < TELLING_NS
    # That a key is right, its answer tells. Here the processor does, which expects a comparison to fail, as
    # nine of ten do: what it began in vain takes some nanoseconds.
    assert spread(medians, "") < 2 * TELLING_NS


def spread(medians: dict[str, float], kind: str) -> float:
    values = [value for name, value in medians.items() if name.startswith(kind)]
    return max(values) - min(values)
