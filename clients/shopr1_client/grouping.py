"""Grouping of single rollouts, as trainers have them, and the groups' rewards in the rollouts' order."""

import contextlib
import json
import re
import reprlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from shopr1_client.errors import FieldError, InvalidRequestError, summary
from shopr1_client.wire import (
    Completion,
    GroundTruth,
    Group,
    Message,
    Prompt,
    TokenIds,
)
from shopr1_client.wire_prompt import PromptOptions

Truth = str | dict[str, Any]
_Reward = TypeVar("_Reward")

_TRUTH: TypeAdapter[Truth] = TypeAdapter(GroundTruth)
_LOCATION = re.compile(r"groups\[(\d+)\](?:\.completions\[(\d+)\])?")


class RolloutLike(Protocol):
    """A completion, its prompt, and the human's action."""

    @property
    def prompt(self) -> str | list[Message] | TokenIds: ...
    @property
    def completion(self) -> Any: ...  # noqa: ANN401  # as `wire.Completion` accepts
    @property
    def ground_truth(self) -> Any: ...  # noqa: ANN401  # as `wire.GroundTruth` accepts
    @property
    def options(self) -> PromptOptions: ...


class Rollout(BaseModel):
    """A completion, its prompt, and the human's action. All but the action is validated on creation."""

    model_config = ConfigDict(frozen=True)

    prompt: Prompt
    completion: Completion
    ground_truth: Any
    """As a data set delivers it; `Grouping` validates it, and knows which rollout it belongs to."""
    options: PromptOptions = PromptOptions()


class Grouping:
    """Rollouts grouped by prompt, with its options, and ground truth: each prompt is sent and computed once.

    Attributes:
        groups: in the order of their first rollouts.
        indices: the rollouts of each group.

    >>> pairs = "ax", "by", "az"
    >>> grouping = Grouping([Rollout(prompt=p, completion=c, ground_truth="{}") for p, c in pairs])
    >>> [group.completions for group in grouping.groups], grouping.indices
    ([['x', 'z'], ['y']], [[0, 2], [1]])

    Raises:
        InvalidRequestError: names each rollout whose ground truth is neither an object nor a string.
    """

    def __init__(self, rollouts: Sequence[RolloutLike]) -> None:
        truths = _checked_truths(rollouts)
        members: dict[Hashable, list[int]] = {}
        for i, (rollout, truth) in enumerate(zip(rollouts, truths, strict=True)):
            key = _prompt_key(rollout.prompt), _options_key(rollout), _truth_key(truth)
            members.setdefault(key, []).append(i)
        self.indices = list(members.values())
        self.groups = [_group([rollouts[i] for i in own], truths[own[0]]) for own in self.indices]

    def in_order(self, groups: Iterable[Sequence[_Reward]]) -> list[_Reward]:
        """All rewards in the order of the rollouts.

        Args:
            groups: the rewards of each group.
        """
        rewards = {
            i: reward
            for indices, group in zip(self.indices, groups, strict=True)
            for i, reward in zip(indices, group, strict=True)
        }
        return [rewards[i] for i in range(len(rewards))]

    @contextlib.contextmanager
    def naming_rollouts(self) -> Iterator[None]:
        """Within this context errors name rollouts, `rollouts[3].ground_truth.name`, instead of groups."""
        try:
            yield
        except InvalidRequestError as error:
            error.relocate(lambda text: _LOCATION.sub(self._rollout, text))
            raise

    def _rollout(self, match: "re.Match[str]") -> str:
        indices = self.indices[int(match[1])]
        if match[2] is None:
            return f"rollouts[{indices[0]}]"
        return f"rollouts[{indices[int(match[2])]}].completion"


def _checked_truths(rollouts: Sequence[RolloutLike]) -> list[Truth]:
    truths: list[Truth] = []
    errors: list[FieldError] = []
    for i, rollout in enumerate(rollouts):
        try:
            truths.append(_TRUTH.validate_python(rollout.ground_truth))
        except ValidationError:
            message = f"must be an object or a JSON string, not {reprlib.repr(rollout.ground_truth)}"
            errors.append({"location": f"rollouts[{i}].ground_truth", "message": message})
    if errors:
        raise InvalidRequestError(summary(errors), errors=errors)
    return truths


def _group(rollouts: Sequence[RolloutLike], truth: Truth) -> Group:
    completions = [rollout.completion for rollout in rollouts]
    first = rollouts[0]
    return Group(prompt=first.prompt, ground_truth=truth, completions=completions, **_given(first))


def _prompt_key(prompt: str | list[Message] | TokenIds) -> Hashable:
    match prompt:
        case str():
            return prompt
        case TokenIds():
            return TokenIds, tuple(prompt.token_ids)
        case _:
            return Message, tuple((message.role, message.content) for message in prompt)


def _options_key(rollout: RolloutLike) -> str:
    return json.dumps(_given(rollout), sort_keys=True)


def _given(rollout: RolloutLike) -> dict[str, Any]:
    """The options that have a value; those of a prompt of token ids have no effect."""
    return {} if isinstance(rollout.prompt, TokenIds) else rollout.options.given()


def _truth_key(truth: Truth) -> str:
    return truth if isinstance(truth, str) else json.dumps(truth, sort_keys=True)
