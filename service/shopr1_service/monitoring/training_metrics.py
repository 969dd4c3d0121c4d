"""What training looks like from here: rewards, actions and rationales, by run and recipe.

Everything is by the *true* action's type where it is by type at all. Its distribution is the data's and stays
as it is, while a policy that collapses shifts the predicted one, and with it every mean over predicted types.

A rollout that cannot be scored counts in `shopr1_rollouts_total` and nowhere else.

Runs are bounded. When one more comes, all series of the one that was silent longest are dropped.

How much a text repeats itself.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import product
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram

from shopr1_client.reward_logs import terms
from shopr1_client.wire import Reason, Reward, Status
from shopr1_rewards import Judgement, Recipe, needs_policy
from shopr1_rewards.format_error import FormatError
from shopr1_service.core import PreparedRollout, ScoredGroup
from shopr1_service.monitoring.timestamp_gauge import TimestampGauge

INVALID = "invalid"
"""Predicted type of a completion whose format is invalid: there is no action."""
UNKNOWN = "unknown"
"""Predicted type where the recipe's action space does not have it: policies make up any number of them."""

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

_Family = TypeVar("_Family", Counter, Histogram)


class _Families:
    """The metrics. Each has the labels `run` and `recipe` before its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        counter, histogram = self._counter, self._histogram
        self.rollouts = counter(
            "rollouts", "Rollouts by outcome; reason is empty for scored ones.", "status", "reason"
        )
        self.rewards = histogram("reward", "Rewards of scored rollouts.", REWARD_BUCKETS, "action_type")
        self.components = histogram(
            "reward_component",
            "Weighted terms of the rewards of scored rollouts.",
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
            "exact_matches", "Predicted actions that equal the human's in everything.", "action_type"
        )
        self.format_errors = counter(
            "format_errors", "Completions with invalid format, by what is wrong.", "error"
        )
        self.certainties = histogram(
            "self_certainty_nats", "Mean self-certainty of a rationale.", _NATS_BUCKETS, "action_type"
        )
        self.lengths = histogram("rationale_tokens", "Tokens that are measured, by rollout.", _TOKENS_BUCKETS)
        self.repetitions = histogram(
            "rationale_repetition_ratio",
            "Share of a rationale's token 4-grams that occurred before in it.",
            _RATIO_BUCKETS,
        )

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"shopr1_{name}", what, ("run", "recipe", *labels), registry=self._registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        names = ("run", "recipe", *labels)
        return Histogram(f"shopr1_{name}", what, names, buckets=buckets, registry=self._registry)


class _Children:
    """Makes the series of one run and recipe, and can drop them."""

    def __init__(self, families: _Families, run: str, recipe: str) -> None:
        self.families = families
        self._labels = (run, recipe)
        self._made: list[tuple[Counter | Histogram, tuple[str, ...]]] = []

    def make(self, family: _Family, *labels: str) -> _Family:
        own = (*self._labels, *labels)
        self._made.append((family, own))
        return family.labels(*own)

    def drop(self) -> None:
        for family, labels in self._made:
            family.remove(*labels)


class _Distributions:
    """Histograms of one true action type."""

    def __init__(self, children: _Children, true_type: str, components: Iterable[str]) -> None:
        make, families = children.make, children.families
        self._reward = make(families.rewards, true_type)
        self._components = {name: make(families.components, name, true_type) for name in components}
        self._certainty = make(families.certainties, true_type)

    def record(self, reward: Reward, value: float) -> None:
        """Count a scored rollout, whose reward is `value`."""
        self._reward.observe(value)
        for name, term in terms(reward).items():
            self._components[name].observe(term)
        if reward.details.self_certainty_nats is not None:
            self._certainty.observe(reward.details.self_certainty_nats)


class _RecipeSeries:
    """Series of one run with one recipe. What ratios are made of is 0 from the start; the rest comes late."""

    def __init__(self, families: _Families, run: str, recipe: Recipe) -> None:
        self._children = _Children(families, run, recipe.name)
        make, types = self._children.make, tuple(recipe.action_space.types)
        self._rollouts = {outcome: make(families.rollouts, *outcome) for outcome in _OUTCOMES}
        self._actions = {
            pair: make(families.actions, *pair) for pair in product(types, (*types, UNKNOWN, INVALID))
        }
        self._exact_matches = {name: make(families.exact_matches, name) for name in types}
        self._lengths = make(families.lengths)
        self._repetitions = make(families.repetitions)
        self._has_rationales = needs_policy(recipe)
        self._components = tuple(recipe.components)
        self._distributions: dict[str, _Distributions] = {}
        self._format_errors: dict[FormatError, Counter] = {}

    def record(self, true_type: str, rollout: PreparedRollout, reward: Reward) -> None:
        self._rollouts[reward.status.value, reward.reason.value if reward.reason else ""].inc()
        if reward.reward is None:
            return
        self._distributions_of(true_type).record(reward, reward.reward)
        self._record_action(true_type, rollout.judgement)
        if rollout.judgement.failure is not None:
            self._format_error(rollout.judgement.failure.error).inc()
        elif self._has_rationales:
            self._record_rationale(rollout)

    def drop(self) -> None:
        self._children.drop()

    def _record_action(self, true_type: str, judgement: Judgement) -> None:
        self._actions[true_type, _predicted_type(judgement)].inc()
        if judgement.is_exact_match:
            self._exact_matches[true_type].inc()

    def _record_rationale(self, rollout: PreparedRollout) -> None:
        ids = rollout.tokens.ids
        self._lengths.observe(len(rollout.measured))
        self._repetitions.observe(repetition_ratio([ids[index] for index in rollout.measured]))

    def _distributions_of(self, true_type: str) -> _Distributions:
        if true_type not in self._distributions:
            self._distributions[true_type] = _Distributions(self._children, true_type, self._components)
        return self._distributions[true_type]

    def _format_error(self, error: FormatError) -> Counter:
        if error not in self._format_errors:
            family = self._children.families.format_errors
            self._format_errors[error] = self._children.make(family, error.value)
        return self._format_errors[error]


def _predicted_type(judgement: Judgement) -> str:
    prediction = judgement.prediction
    if prediction is None:
        return INVALID
    return prediction.action.type if prediction.is_known_type else UNKNOWN


class TrainingMetrics:
    """See the module.

    Args:
        max_runs: how many runs are told apart at a time; requests that name none are a run, too.
    """

    def __init__(self, registry: CollectorRegistry, max_runs: int) -> None:
        self._max_runs = max_runs
        self._families = _Families(registry)
        self._runs: OrderedDict[str, dict[str, _RecipeSeries]] = OrderedDict()  # the longest silent first
        self._measured_tokens = Counter(
            "shopr1_measured_tokens", "Tokens whose certainty was measured.", registry=registry
        )
        self._last_scored = TimestampGauge(
            "shopr1_last_scored_timestamp_seconds",
            "When a group of the run was scored last.",
            "run",
            registry=registry,
        )

    def observe(self, scored: ScoredGroup) -> None:
        """Count a scored group (an `Observer`)."""
        series = self._series(scored.origin.run, scored.recipe)
        self._last_scored.mark(scored.origin.run)
        for rollout, reward in zip(scored.prepared.rollouts, scored.score.rewards, strict=True):
            series.record(scored.prepared.truth.type, rollout, reward)
            if reward.details.self_certainty_nats is not None:
                self._measured_tokens.inc(reward.details.num_rationale_tokens)

    def _series(self, run: str, recipe: Recipe) -> _RecipeSeries:
        recipes = self._runs.setdefault(run, {})
        self._runs.move_to_end(run)
        if recipe.name not in recipes:
            self._make_room()
            recipes[recipe.name] = _RecipeSeries(self._families, run, recipe)
        return recipes[recipe.name]

    def _make_room(self) -> None:
        while len(self._runs) > self._max_runs:
            run, recipes = self._runs.popitem(last=False)
            self._last_scored.remove(run)
            for series in recipes.values():
                series.drop()


NGRAM = 4


def repetition_ratio(ids: Sequence[int]) -> float:
    """Share of the 4-grams of tokens that occurred before in the text.

        1 − distinct 4-grams / all 4-grams

    Range 0 … 1: 0 where all differ, and where there are fewer than four tokens, so that there is none.

    >>> repetition_ratio([7, 8, 7, 8, 7, 8])  # 7878, 8787, and 7878 again
    0.33333333333333337
    """
    num_ngrams = len(ids) - NGRAM + 1
    if num_ngrams < 1:
        return 0.0
    distinct = set(zip(*(ids[k:] for k in range(NGRAM)), strict=False))
    return 1.0 - len(distinct) / num_ngrams
