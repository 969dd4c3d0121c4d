"""Preparing a request for the engine: rules, tokens, and every check of the request.

All bad fields of a request are collected before it is refused; a refused request is not scored at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from shopr1_client.errors import FieldError, TooLargeError
from shopr1_client.wire import Completion, Group, Limits, Prompt, ScoreRequest, Text, TokenIds
from shopr1_client.wire_base import is_unicode
from shopr1_rewards import Action, GroundTruthError, Recipe, judge, read_ground_truth
from shopr1_service.core import (
    CodecError,
    PreparedGroup,
    PreparedRollout,
    Tokens,
)
from shopr1_service.field_errors import raise_if_any
from shopr1_service.policy.tokenizer import Codec

_NO_TOKENS = Tokens("", (), ())


@dataclass
class _Preparation:
    codec: Codec
    recipe: Recipe
    wants_ids: bool
    max_request_tokens: int
    groups: list[PreparedGroup] = field(default_factory=list)
    errors: list[FieldError] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, group: Group, path: str) -> None:
        """Prepare a group, or collect its errors."""
        truth = self._truth(group, path)
        given = [self._given(c, f"{path}.completions[{j}]") for j, c in enumerate(group.completions)]
        rollouts = [self._rollout(tokens, truth) for tokens in given] if truth else []
        is_needed = self.wants_ids or any(rollout.measured for rollout in rollouts)
        prompt_ids = self._prompt(group.prompt, f"{path}.prompt", is_needed=is_needed)
        self._count(prompt_ids)
        if truth is not None:
            self.groups.append(PreparedGroup(group.id, truth, prompt_ids, rollouts))

    def _truth(self, group: Group, path: str) -> Action | None:
        try:
            return read_ground_truth(group.ground_truth, self.recipe)
        except GroundTruthError as error:
            key = f".{error.field}" if error.field and not isinstance(group.ground_truth, str) else ""
            self._refuse(f"{path}.ground_truth{key}", str(error))
            return None

    def _prompt(self, prompt: Prompt, path: str, *, is_needed: bool) -> Sequence[int]:
        """The prompt's ids. Bad prompts are refused even if no completion uses them."""
        if isinstance(prompt, TokenIds):
            return self._checked(prompt, path)
        if isinstance(prompt, str):
            return self.codec.encode_ids(prompt) if is_needed else ()
        try:
            return self.codec.encode_chat(prompt)
        except CodecError as error:
            self._refuse(path, str(error))
            return ()

    def _given(self, completion: Completion, path: str) -> Tokens | str:
        if isinstance(completion, TokenIds):
            return self.codec.decode(self._checked(completion, path))
        return completion.text if isinstance(completion, Text) else completion

    def _rollout(self, given: Tokens | str, truth: Action) -> PreparedRollout:
        text = given if isinstance(given, str) else given.text
        judgement = judge(text, truth, self.recipe, self.codec.end_tokens)
        span = judgement.certainty_span
        tokens = self._tokens(given, is_needed=span is not None)
        self._count(tokens.ids)
        return PreparedRollout(judgement, tokens, tokens.overlapping(span) if span else ())

    def _tokens(self, given: Tokens | str, *, is_needed: bool) -> Tokens:
        if isinstance(given, Tokens):
            return given
        # Text is tokenised only where its tokens matter. With a format error it may not even be Unicode.
        is_needed = is_needed or (self.wants_ids and is_unicode(given))
        return self.codec.encode_text(given) if is_needed else _NO_TOKENS

    def _checked(self, given: TokenIds, path: str) -> Sequence[int]:
        for k, token_id in enumerate(given.token_ids):
            if token_id >= self.codec.num_ids:
                message = f"token id {token_id} is not below {self.codec.num_ids}"
                self._refuse(f"{path}.token_ids[{k}]", message)
                return ()
        return given.token_ids

    def _refuse(self, location: str, message: str) -> None:
        self.errors.append({"location": location, "message": message})

    def _count(self, ids: Sequence[int]) -> None:
        self.num_tokens += len(ids)
        if self.num_tokens > self.max_request_tokens:
            raise TooLargeError(f"the request has more than max_request_tokens = {self.max_request_tokens}")


def prepare(
    request: ScoreRequest, recipe: Recipe, codec: Codec, limits: Limits, *, wants_ids: bool
) -> list[PreparedGroup]:
    """Apply the rules and tokenise.

    Args:
        wants_ids: tokenise also completions without measured tokens, since the response includes the ids.

    Raises:
        TooLargeError: the request exceeds a limit.
        InvalidRequestError: names every bad field.
    """
    _check_counts(request, limits)
    preparation = _Preparation(codec, recipe, wants_ids, limits.max_request_tokens)
    for i, group in enumerate(request.groups):
        preparation.add(group, f"groups[{i}]")
    raise_if_any(preparation.errors)
    return preparation.groups


def _check_counts(request: ScoreRequest, limits: Limits) -> None:
    if len(request.groups) > limits.max_groups:
        raise TooLargeError(f"{len(request.groups)} groups, max_groups = {limits.max_groups}")
    for i, group in enumerate(request.groups):
        num_completions = len(group.completions)
        if num_completions > limits.max_completions_per_group:
            raise TooLargeError(
                f"groups[{i}] has {num_completions} completions, "
                f"max_completions_per_group = {limits.max_completions_per_group}"
            )
