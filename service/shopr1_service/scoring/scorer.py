"""Scoring a request: rules, engine, rewards. Every route and the command line use it."""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from shopr1_client import wire
from shopr1_client.errors import InvalidRequestError
from shopr1_client.wire import Completion, Group, Include, PolicyRef, ScoreRequest, Status, Text, TokenIds
from shopr1_client.wire_policy import VersionDemand
from shopr1_rewards import Recipe, measured_terms, needs_policy, total
from shopr1_service.answers import Details, GroupScore, Reward, ScoreResponse, TokenCertainty
from shopr1_service.concurrency import checkpoint, in_pool
from shopr1_service.core import (
    BatchKey,
    Certainty,
    GroupCertainties,
    GroupFacts,
    Observer,
    Origin,
    PreparedGroup,
    PreparedRollout,
    Progress,
    RolloutFacts,
    ScoredGroup,
    ScoredRequest,
    Target,
    Unmeasurable,
)
from shopr1_service.memory.budget import Account, Hold, MemoryBudget
from shopr1_service.memory.sizes import prepared_bytes
from shopr1_service.monitoring.metrics import Metrics, Phase
from shopr1_service.monitoring.spans import span
from shopr1_service.monitoring.training_metrics import repetition_ratio
from shopr1_service.scheduling.engine_client import EngineClient
from shopr1_service.scoring.prepare import prepare
from shopr1_service.scoring.recipe_book import RecipeBook
from shopr1_service.settings import Settings

logger = logging.getLogger(__name__)

_NUM_PREPARE_THREADS = 2
_FEW = 64
"""Rollouts whose rewards are written down at once, on the event loop."""
_FEW_CHARS = 4096
"""Characters that are judged and tokenised at once, on the event loop: a millisecond or two."""

# Python 3.11 looks up a member of an enumeration by a function of Python: too slow for every rollout.
_SCORED, _UNSCORABLE = Status.SCORED, Status.UNSCORABLE

Measurement = Certainty | Unmeasurable | None
"""None: the completion has no measured tokens."""


class Scorer:
    """Scores requests with one engine. All but light ones are prepared beside the event loop."""

    def __init__(
        self,
        engine: EngineClient,
        recipes: RecipeBook,
        settings: Settings,
        metrics: Metrics,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.engine = engine
        self._observers = observers
        self._recipes = recipes
        self._limits = settings.limits
        self._metrics = metrics
        self._preparers = ThreadPoolExecutor(_NUM_PREPARE_THREADS, "prepare")

    async def score(self, request: ScoreRequest, origin: Origin) -> wire.ScoreResponse:
        """Score every rollout of a request, and tell the observers. Raises as `compute`."""
        scored = await self.compute(request)
        await self.observe(request, origin, scored)
        response = replace(scored.response, request_id=origin.request_id)
        return wire.ScoreResponse.model_validate(response, from_attributes=True)

    async def compute(
        self, request: ScoreRequest, progress: Progress | None = None, *, memory: Hold | None = None
    ) -> ScoredRequest:
        """Score every rollout of a request. If cancelled, its queued groups are dropped.

        The response has no request id: several requests may share it.

        Args:
            progress: is kept up to date.
            memory: the request's. It is shared while this lasts, and grows by what is made of the request.

        Raises:
            InvalidRequestError, TooLargeError: the request is wrong.
            PolicyVersionError: the demanded version is not loaded in time.
            OverloadedError: the queue or the memory is full.
            NotReadyError: the engine has failed, or the service is shutting down.
        """
        with memory.shared() if memory else MemoryBudget().hold(Account.REQUESTS) as shared:
            return await self._compute(request, progress, shared)

    async def _compute(self, request: ScoreRequest, progress: Progress | None, memory: Hold) -> ScoredRequest:
        recipe = self._recipe(request.recipe)
        target = _target(request)
        await self.engine.new_versions.wait_for(target)
        self.engine.refuse_if_full()
        prepare = partial(self._prepare, request, recipe)
        is_light = _is_light(request, recipe)
        groups, num_bytes = prepare() if is_light else await in_pool(self._preparers, prepare)
        memory.grow(num_bytes)
        token_groups = [group.token_group() for group in groups]
        key = BatchKey(recipe.self_certainty, target)
        measured = await self.engine.compute_certainties(token_groups, key, progress)
        score = partial(_scores, request, groups, measured, recipe)
        scores, facts = score() if _is_small(request) else await in_pool(None, score)
        response = ScoreResponse(
            request_id="",
            recipe=self._recipes.reference(recipe),
            policy=self._newest(measured, target),
            groups=scores,
        )
        return ScoredRequest(response, recipe, facts)

    async def observe(self, request: ScoreRequest, origin: Origin, scored: ScoredRequest) -> None:
        """Tell the observers of each group of a request that gets this response."""
        groups = zip(request.groups, scored.facts, scored.response.groups, strict=True)
        num_observed = 0  # in this turn of the event loop
        for index, (sent, facts, score) in enumerate(groups):
            num_observed += len(score.rewards)
            if index and num_observed > _FEW:
                await asyncio.sleep(0)  # other requests may take a turn
                num_observed = len(score.rewards)
            self._notify(ScoredGroup(origin, scored.recipe, sent, facts, score, index))

    def close(self) -> None:
        """End the threads; work that has not started is dropped."""
        self._preparers.shutdown(wait=False, cancel_futures=True)
        self.engine.close()

    def _notify(self, scored: ScoredGroup) -> None:
        for observer in self._observers:
            try:
                observer(scored)
            except Exception:  # the reward is right, even if it cannot be logged
                logger.exception("request %s: an observer failed", scored.origin.request_id)

    def _recipe(self, name: str | None) -> Recipe:
        recipe = self._recipes.get(name)
        if recipe is None:
            known = ", ".join(recipe.name for recipe in self._recipes)
            message = f"no recipe {name!r}; there are: {known}"
            raise InvalidRequestError(message, errors=[{"location": "recipe", "message": message}])
        return recipe

    def _newest(self, measured: Sequence[GroupCertainties], target: Target) -> PolicyRef:
        versions = [measurements.version for measurements in measured] or [self.engine.versions.find(target)]
        newest = max(versions, key=lambda version: version.number)
        return PolicyRef(
            model=self.engine.info.model,
            version=newest.name,
            number=newest.number,
            adapter=newest.adapter,
        )

    def _prepare(self, request: ScoreRequest, recipe: Recipe) -> tuple[list[PreparedGroup], int]:
        """The prepared groups, and the memory that they and their answer take."""
        wants_ids = Include.TOKEN_IDS in request.include
        with self._metrics.phase(Phase.PREPARE), span("prepare"):
            groups = prepare(request, recipe, self.engine.codec, self._limits, wants_ids=wants_ids)
            return groups, prepared_bytes(request, groups)


def _target(request: ScoreRequest) -> Target:
    demand = request.policy_version
    return Target(request.adapter, VersionDemand(exact=demand) if isinstance(demand, str) else demand)


def _is_small(request: ScoreRequest) -> bool:
    """Whether writing down the rewards does not keep the event loop from other requests."""
    return not request.include and sum(len(group.completions) for group in request.groups) <= _FEW


def _is_light(request: ScoreRequest, recipe: Recipe) -> bool:
    """Whether preparing a request takes less time than handing it to a thread and back, or little more."""
    if not _is_small(request):
        return False
    num_chars = 0
    for group in request.groups:
        if isinstance(group.prompt, list):  # a chat template may take any time
            return False
        num_chars += _num_chars(group.prompt) if needs_policy(recipe) else 0
        num_chars += sum(map(_num_chars, group.completions))
    return num_chars <= _FEW_CHARS


def _num_chars(item: str | Text | TokenIds) -> int:
    if isinstance(item, TokenIds):
        return len(item.token_ids)
    return len(item if isinstance(item, str) else item.text)


def _scores(
    request: ScoreRequest,
    groups: Sequence[PreparedGroup],
    measured: Sequence[GroupCertainties],
    recipe: Recipe,
) -> tuple[list[GroupScore], list[GroupFacts]]:
    writer = _Writer(recipe, request.include)
    scores, facts = [], []
    for sent, group, measurements in zip(request.groups, groups, measured, strict=True):
        checkpoint()
        scores.append(writer.group_score(group, measurements))
        facts.append(_facts(sent, group))
    return scores, facts


class _Writer:
    """Writes down the rewards of a request."""

    def __init__(self, recipe: Recipe, include: Sequence[Include]) -> None:
        self._recipe = recipe
        self._attribute_names = recipe.action_space.attribute_names
        self._wants_tokens = Include.TOKENS in include
        self._wants_ids = Include.TOKEN_IDS in include

    def group_score(self, group: PreparedGroup, measured: GroupCertainties) -> GroupScore:
        measurements = iter(measured.values)
        shared: dict[int, Reward] = {}  # by the identity of a rollout: equal texts have one, see `prepare`
        rewards = []
        for rollout in group.rollouts:
            if rollout.measured:
                reward = self._reward(rollout, next(measurements))
            elif (found := shared.get(id(rollout))) is None:
                reward = shared[id(rollout)] = self._reward(rollout, None)
            else:
                reward = found
            rewards.append(reward)
        return GroupScore(
            id=group.id,
            policy_version=measured.version.name,
            policy_number=measured.version.number,
            adapter=measured.version.adapter,
            rewards=rewards,
            warnings=group.warnings,
            prompt_token_ids=list(group.prompt_ids) if self._wants_ids else None,
        )

    def _reward(self, rollout: PreparedRollout, measurement: Measurement) -> Reward:
        components = rollout.judgement.components(_measured_terms(measurement, self._recipe))
        failed = measurement if isinstance(measurement, Unmeasurable) else None
        return Reward(
            reward=total(components),
            status=_UNSCORABLE if failed else _SCORED,
            reason=failed.reason if failed else None,
            message=failed.message if failed else None,
            components=components,
            details=self._details(rollout, measurement),
        )

    def _details(self, rollout: PreparedRollout, measurement: Measurement) -> Details:
        judgement = rollout.judgement
        prediction, failure, similarity = judgement.prediction, judgement.failure, judgement.similarity
        certainty = measurement if isinstance(measurement, Certainty) else None
        return Details(
            format_error=failure.error.value if failure else None,
            format_message=failure.message if failure else None,
            predicted_action=prediction.action.to_dict() if prediction else None,
            unknown_action_type=prediction is not None and not prediction.is_known_type,
            missing_attributes=prediction.missing_attributes if prediction else (),
            extra_keys=prediction.extra_keys if prediction else (),
            converted=prediction.converted if prediction else (),
            similarity={name: similarity.get(name) for name in self._attribute_names},
            type_match=judgement.is_type_match,
            exact_match=judgement.is_exact_match,
            self_certainty_nats=certainty.mean if certainty else None,
            num_rationale_tokens=len(rollout.measured),
            tokens=list(_tokens(rollout, certainty)) if certainty and self._wants_tokens else None,
            completion_token_ids=list(rollout.tokens.ids) if self._wants_ids else None,
        )


_NO_FACTS = RolloutFacts()


def _facts(sent: Group, prepared: PreparedGroup) -> GroupFacts:
    rollouts = zip(sent.completions, prepared.rollouts, strict=True)
    return GroupFacts(
        prepared.truth, [_rollout_facts(completion, rollout) for completion, rollout in rollouts]
    )


def _rollout_facts(sent: Completion, rollout: PreparedRollout) -> RolloutFacts:
    decoded = rollout.tokens.text if isinstance(sent, TokenIds) else None
    if not rollout.measured and rollout.unknown_end is None and decoded is None:
        return _NO_FACTS
    ids = [rollout.tokens.ids[index] for index in rollout.measured]
    return RolloutFacts(repetition_ratio(ids), rollout.unknown_end, decoded)


def _measured_terms(measurement: Measurement, recipe: Recipe) -> dict[str, float | None]:
    """The components that the policy decides: none where there was nothing to measure."""
    match measurement:
        case None:
            return {}
        case Certainty():
            return measured_terms(measurement.mean, recipe)
        case Unmeasurable():
            return measured_terms(None, recipe)


def _tokens(rollout: PreparedRollout, certainty: Certainty) -> Iterator[TokenCertainty]:
    for index, value in zip(rollout.measured, certainty.values, strict=True):
        yield TokenCertainty(index=index, token_id=rollout.tokens.ids[index], value=value)
