"""Metrics of trainings: rewards, actions and rationales, by run and recipe.

Metrics by action type use the *true* action's type. Its distribution is a property of the data, while a
policy that collapses shifts the predicted type, and with it every mean over predicted types.

A rollout that cannot be scored counts in `shopr1_rollouts_total` and nowhere else.

The number of runs is bounded. A new run beyond it replaces the run that has been silent longest.
"""

import collections
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from prometheus_client import CollectorRegistry, Counter

from shopr1_client.wire import Reason, Status
from shopr1_client.wire_prompt import WarningCode
from shopr1_rewards import Recipe, needs_policy
from shopr1_service.answers import Details, Reward
from shopr1_service.core import RolloutFacts, ScoredGroup
from shopr1_service.memory.budget import Account, MemoryBudget
from shopr1_service.monitoring.batch_histogram import BatchHistogram
from shopr1_service.monitoring.timestamp_gauge import TimestampGauge

INVALID = "invalid"
"""Predicted type of a completion in invalid format, which has no action."""
UNKNOWN = "unknown"
"""Predicted type that is not in the recipe's action space: policies invent any number of them."""

# The steps of the paper's Table 1, with room for self-certainty above each (0.03 … 0.13 there): invalid; the
# format alone (0.5 …); type, not all attributes (0.8 …); type and attributes (1 …); and 1000 · R on top, R
# being above 0.75, up to the exact match (1001.1 …). 10 and 100 are for recipes with a smaller value term.
REWARD_BUCKETS = (0, 0.75, 0.99, 1.5, 10, 100, 750, 800, 850, 900, 950, 1000, 1002)
# The same for single terms: 0.1 and 0.2 for attributes, 0.3 for the type, 0.5 for the format, and the value.
# Self-certainty has a histogram of its own.
COMPONENT_BUCKETS = (0, 0.1, 0.2, 0.3, 0.5, 1, 100, 750, 900, 1001)
_NATS_BUCKETS = (0.5, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40)
_TOKENS_BUCKETS = (0, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
_RATIO_BUCKETS = (0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)

_OUTCOMES = ((Status.SCORED.value, ""), *((Status.UNSCORABLE.value, reason.value) for reason in Reason))
_NGRAM = 4

_SERIES_BYTES = {Counter: 800, BatchHistogram: 800}
"""Memory of one series."""


class _Families:
    """The metrics. Each has the labels `run` and `recipe` before its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        counter, histogram = self._counter, self._histogram
        self.rollouts = counter(
            "rollouts", "Rollouts by outcome; the reason is empty for scored ones.", "status", "reason"
        )
        self.rewards = histogram("reward", "Rewards of scored rollouts.", REWARD_BUCKETS, "action_type")
        self.components = histogram(
            "reward_component",
            "Weighted components of the rewards of scored rollouts.",
            COMPONENT_BUCKETS,
            "component",
            "action_type",
        )
        self.actions = counter(
            "actions",
            "Scored rollouts by the human's action and the policy's.",
            "true_type",
            "predicted_type",
        )
        self.exact_matches = counter(
            "exact_matches", "Predicted actions whose type and attributes equal the human's.", "action_type"
        )
        self.format_errors = counter("format_errors", "Completions in invalid format, by error.", "error")
        self.unknown_ends = counter(
            "unknown_end_tokens",
            "Completions that are invalid only because of a special token at their end.",
        )
        self.warnings = counter("warnings", "Groups with a warning, by its code.", "code")
        self.certainties = histogram(
            "self_certainty_nats", "Mean self-certainty of a rationale.", _NATS_BUCKETS, "action_type"
        )
        self.lengths = histogram("rationale_tokens", "Measured tokens of a rollout.", _TOKENS_BUCKETS)
        self.repetitions = histogram(
            "rationale_repetition_ratio",
            "Share of a rationale's token 4-grams that occurred before in it.",
            _RATIO_BUCKETS,
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"shopr1_{name}", text, ("run", "recipe", *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> BatchHistogram:
        names = ("run", "recipe", *labels)
        return BatchHistogram(f"shopr1_{name}", text, names, buckets, self._registry)


class _RecipeSeries:
    """Series of one run with one recipe. Those that ratios are made of are 0 from the start."""

    def __init__(self, families: _Families, run: str, recipe: Recipe, memory: MemoryBudget) -> None:
        self._memory = memory.hold(Account.RUNS)
        self._families = families
        self._labels = (run, recipe.name)
        self._series: dict[tuple[Any, ...], Any] = {}  # a look-up by labels is slow
        self._components = recipe.component_names
        self._has_rationales = needs_policy(recipe)
        types = tuple(recipe.action_space.types)
        for outcome in _OUTCOMES:
            self._of(families.rollouts, *outcome)
        for pair in product(types, (*types, UNKNOWN, INVALID)):
            self._of(families.actions, *pair)
        for name in types:
            self._of(families.exact_matches, name)
        for code in WarningCode:
            self._of(families.warnings, code.value)
        self._of(families.unknown_ends)
        self._of(families.lengths)
        self._of(families.repetitions)

    def remove(self) -> None:
        """Drop the series."""
        for family, *labels in self._series:
            family.remove(*self._labels, *labels)
        self._memory.release()

    def record(self, true_type: str, scored: ScoredGroup) -> None:
        """Count the rollouts of a group."""
        families, rewards = self._families, scored.score.rewards
        for warning in scored.score.warnings:
            self._of(families.warnings, warning.code.value).inc()
        self._count(families.rollouts, map(_outcome, rewards))
        pairs = zip(scored.facts.rollouts, rewards, strict=True)
        found = [(facts, each) for facts, each in pairs if each.reward is not None]
        self._record_rewards(true_type, [each for _, each in found])
        self._record_formats([(facts, each.details) for facts, each in found])

    def _record_rewards(self, true_type: str, rewards: Sequence[Reward]) -> None:
        families, details = self._families, [each.details for each in rewards]
        values = [each.reward for each in rewards if each.reward is not None]
        self._observe(families.rewards, values, true_type)
        for name in self._components:
            self._observe(
                families.components, [each.components[name] or 0.0 for each in rewards], name, true_type
            )
        nats = [each.self_certainty_nats for each in details if each.self_certainty_nats is not None]
        self._observe(families.certainties, nats, true_type)
        self._count(families.actions, [(true_type, _predicted_type(each)) for each in details])
        if num_exact := sum([each.exact_match for each in details]):
            self._of(families.exact_matches, true_type).inc(num_exact)

    def _record_formats(self, rollouts: Sequence[tuple[RolloutFacts, Details]]) -> None:
        families = self._families
        errors = [(facts, each) for facts, each in rollouts if each.format_error is not None]
        if errors:
            self._count(families.format_errors, [(each.format_error or "",) for _, each in errors])
            num_ends = sum(facts.unknown_end is not None for facts, _ in errors)
            self._of(families.unknown_ends).inc(num_ends)
        if self._has_rationales:
            valid = [(facts, each) for facts, each in rollouts if each.format_error is None]
            self._observe(families.lengths, [each.num_rationale_tokens for _, each in valid])
            self._observe(families.repetitions, [facts.repetition_ratio for facts, _ in valid])

    def _count(self, family: Counter, events: Iterable[tuple[str, ...]]) -> None:
        """Count events, each by its labels."""
        for labels, number in collections.Counter(events).items():
            self._of(family, *labels).inc(number)

    def _observe(self, family: BatchHistogram, values: Sequence[float], *labels: str) -> None:
        if values:
            self._of(family, *labels).observe(values)

    def _of(self, family: Counter | BatchHistogram, *labels: str) -> Any:  # noqa: ANN401  # the family's own
        key = (family, *labels)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = family.labels(*self._labels, *labels)
            self._memory.grow(_SERIES_BYTES[type(family)])
        return series


def _outcome(reward: Reward) -> tuple[str, str]:
    return reward.status.value, reward.reason.value if reward.reason else ""


def _predicted_type(details: Details) -> str:
    if details.predicted_action is None:
        return INVALID
    return UNKNOWN if details.unknown_action_type else details.predicted_action["type"]


class TrainingMetrics:
    """Counts scored groups by run and recipe.

    Args:
        max_runs: runs with series of their own; requests without a run's name are a run, too.
        memory: counts the series.
    """

    def __init__(self, registry: CollectorRegistry, max_runs: int, memory: MemoryBudget) -> None:
        self._max_runs = max_runs
        self._memory = memory
        self._families = _Families(registry)
        self._runs: OrderedDict[str, dict[str, _RecipeSeries]] = OrderedDict()  # the longest silent first
        self._measured_tokens = Counter(
            "shopr1_measured_tokens", "Tokens whose self-certainty was computed.", registry=registry
        )
        self._last_scored = TimestampGauge(
            "shopr1_last_scored_timestamp_seconds",
            "Time of the run's last scored group.",
            "run",
            registry=registry,
        )

    def observe(self, scored: ScoredGroup) -> None:
        """Count a scored group (an `Observer`)."""
        series = self._series(scored.origin.run, scored.recipe)
        self._last_scored.set_now(scored.origin.run)
        series.record(scored.facts.truth.type, scored)
        details = [reward.details for reward in scored.score.rewards]
        num_measured = [each.num_rationale_tokens for each in details if each.self_certainty_nats is not None]
        if num_measured:
            self._measured_tokens.inc(sum(num_measured))

    def _series(self, run: str, recipe: Recipe) -> _RecipeSeries:
        recipes = self._runs.setdefault(run, {})
        self._runs.move_to_end(run)
        if recipe.name not in recipes:
            self._make_room()
            recipes[recipe.name] = _RecipeSeries(self._families, run, recipe, self._memory)
        return recipes[recipe.name]

    def _make_room(self) -> None:
        while len(self._runs) > self._max_runs:
            run, gone = self._runs.popitem(last=False)
            for series in gone.values():
                series.remove()
            self._last_scored.remove(run)


def repetition_ratio(ids: Sequence[int]) -> float:
    """Share of the 4-grams of tokens that occurred before in the text.

        1 − distinct 4-grams / all 4-grams

    In [0, 1]: 0 if all differ, and if there are fewer than four tokens.

    >>> repetition_ratio([7, 8, 7, 8, 7, 8])  # 7878, 8787, and 7878 again
    0.33333333333333337
    """
    num_ngrams = len(ids) - _NGRAM + 1
    if num_ngrams < 1:
        return 0.0
    distinct = set(zip(*(ids[k:] for k in range(_NGRAM)), strict=False))
    return 1.0 - len(distinct) / num_ngrams
