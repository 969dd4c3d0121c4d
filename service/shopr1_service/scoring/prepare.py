"""Preparing a request for the engine: rules, tokens, and every check of the request.

All bad fields of a request are collected before it is refused; a refused request is not scored at all.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from shopr1_client.errors import FieldError, TooLargeError
from shopr1_client.wire import Group, Limits, Message, ScoreRequest, Text, TokenIds
from shopr1_client.wire_base import is_unicode
from shopr1_client.wire_prompt import PromptOptions, ScoreWarning, WarningCode
from shopr1_rewards import Action, GroundTruthError, Judge, Recipe, judge, read_ground_truth
from shopr1_rewards.format_error import FormatError, FormatFailure
from shopr1_service.concurrency import checkpoint
from shopr1_service.core import (
    CodecError,
    PreparedGroup,
    PreparedRollout,
    Tokens,
)
from shopr1_service.field_errors import raise_if_any
from shopr1_service.policy.prompts.tokenizer import Codec

_MESSAGE_CHARS = 16
"""Characters that count for a message beside its role and content."""
_NO_TOKENS = Tokens("", (), ())


@dataclass
class _Preparation:
    codec: Codec
    recipe: Recipe
    defaults: PromptOptions
    wants_ids: bool
    max_request_tokens: int
    groups: list[PreparedGroup] = field(default_factory=list)
    errors: list[FieldError] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, group: Group, path: str) -> None:
        """Prepare a group, or collect its errors."""
        truth = self._truth(group, path)
        given = [
            each if isinstance(each, str) else self._given(each, path, j)
            for j, each in enumerate(group.completions)
        ]
        rollouts = [] if truth is None else self._rollouts(given, truth, path)
        is_needed = self.wants_ids or any(rollout.measured for rollout in rollouts)
        warnings = list(_end_warnings(rollouts))
        prompt_ids = self._prompt(group, f"{path}.prompt", warnings, is_needed=is_needed)
        self._count(prompt_ids)
        if truth is not None:
            self.groups.append(PreparedGroup(group.id, truth, prompt_ids, rollouts, warnings))

    def _truth(self, group: Group, path: str) -> Action | None:
        try:
            return read_ground_truth(group.ground_truth, self.recipe)
        except GroundTruthError as error:
            key = f".{error.field}" if error.field and not isinstance(group.ground_truth, str) else ""
            self._refuse(f"{path}.ground_truth{key}", str(error))
            return None

    def _prompt(
        self, group: Group, path: str, warnings: list[ScoreWarning], *, is_needed: bool
    ) -> Sequence[int]:
        """The prompt's ids. Bad prompts are refused even if no completion uses them."""
        prompt = group.prompt
        if isinstance(prompt, TokenIds):
            return self._checked(prompt, path)
        if isinstance(prompt, str) and not is_needed:
            return ()
        options = group.over(self.defaults)
        try:
            if isinstance(prompt, str):
                ids = self.codec.encode_prompt(prompt, options, warnings.append)
            else:
                ids = self.codec.encode_chat(prompt, options, warnings.append)
        except CodecError as error:
            self._refuse(path, str(error))
            return ()
        return self._within_embedding(ids, path)

    def _given(self, completion: Text | TokenIds, path: str, j: int) -> Tokens | str | None:
        if isinstance(completion, Text):
            return completion.text
        checkpoint()
        path = _completion_path(path, j)
        try:
            return self.codec.decode(self._checked(completion, path))
        except CodecError as error:
            self._refuse(f"{path}.token_ids", str(error))
            return None

    def _rollouts(
        self, given: Sequence[Tokens | str | None], truth: Action, path: str
    ) -> list[PreparedRollout]:
        """The rollouts of a group. Equal texts are judged once, and share one: policies collapse."""
        judge = Judge(truth, self.recipe, self.codec.end_tokens)
        known: dict[str, PreparedRollout] = {}
        rollouts = []
        for j, each in enumerate(given):
            checkpoint()
            if each is None:
                continue
            found = known.get(each) if isinstance(each, str) else None
            rollout = found or self._rollout(each, judge, truth)
            if isinstance(each, str):
                known[each] = rollout
            if rollout.tokens.ids:
                self._within_embedding(rollout.tokens.ids, _completion_path(path, j))
                self._count(rollout.tokens.ids)
            rollouts.append(rollout)
        return rollouts

    def _rollout(self, given: Tokens | str, judge: Judge, truth: Action) -> PreparedRollout:
        text = given if isinstance(given, str) else given.text
        judgement = judge(text)
        span, unknown_end = judgement.certainty_span, None
        if judgement.failure is not None:
            unknown_end = self._unknown_end(text, truth, judgement.failure)
            if unknown_end is not None:
                judgement = judgement._replace(failure=_unknown_end_failure(unknown_end))
        tokens = self._tokens(given, is_needed=span is not None)
        return PreparedRollout(judgement, tokens, tokens.overlapping(span) if span else (), unknown_end)

    def _unknown_end(self, text: str, truth: Action, failure: FormatFailure) -> str | None:
        """The special token at the end without which the format would be valid."""
        if failure.error is not FormatError.EXTRA_TEXT:
            return None
        token = self.codec.unknown_end(text)
        if token is None or judge(text, truth, self.recipe, (*self.codec.end_tokens, token)).failure:
            return None
        return token

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

    def _within_embedding(self, ids: Sequence[int], path: str) -> Sequence[int]:
        """Ids of a text, refused if the tokenizer has more tokens than the policy."""
        largest = max(ids, default=0)
        if largest < self.codec.num_ids:
            return ids
        text = self.codec.decode([largest]).text
        message = f"contains {text!r}, token id {largest}, which is not below {self.codec.num_ids}"
        self._refuse(path, f"{message}: the tokenizer has more tokens than the policy")
        return ()

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
        StoppedError: nobody waits for the result any more.
    """
    check_size(request, limits)
    preparation = _Preparation(codec, recipe, request, wants_ids, limits.max_request_tokens)
    for i, group in enumerate(request.groups):
        preparation.add(group, f"groups[{i}]")
    raise_if_any(preparation.errors)
    return preparation.groups


def _unknown_end_failure(token: str) -> FormatFailure:
    message = f"{token!r} after the object, which is not an end token of the policy (setting end_tokens)"
    return FormatFailure(FormatError.EXTRA_TEXT, message)


def _end_warnings(rollouts: Sequence[PreparedRollout]) -> Iterator[ScoreWarning]:
    counts = Counter(rollout.unknown_end for rollout in rollouts if rollout.unknown_end is not None)
    for token, count in counts.items():
        message = f"{count} of {len(rollouts)} completions are invalid only because they end with {token!r}"
        yield ScoreWarning(code=WarningCode.UNKNOWN_END_TOKEN, message=message)


def _completion_path(path: str, j: int) -> str:
    return f"{path}.completions[{j}]"


def check_size(request: ScoreRequest, limits: Limits) -> None:
    """Refuse a request by its size, before any work on its content.

    Raises:
        TooLargeError: names the field and the limit.
    """
    if len(request.groups) > limits.max_groups:
        raise TooLargeError(f"{len(request.groups)} groups, max_groups = {limits.max_groups}")
    num_ids = 0
    for i, group in enumerate(request.groups):
        num_completions = len(group.completions)
        if num_completions > limits.max_completions_per_group:
            raise TooLargeError(
                f"groups[{i}] has {num_completions} completions, "
                f"max_completions_per_group = {limits.max_completions_per_group}"
            )
        for j, item in enumerate((group.prompt, *group.completions), -1):
            if isinstance(item, TokenIds):
                num_ids += len(item.token_ids)
                if num_ids > limits.max_request_tokens:
                    message = f"the request has more than max_request_tokens = {limits.max_request_tokens}"
                    raise TooLargeError(f"{message}, up to {_item_path(i, j)}")
            elif (num_chars := _num_chars(item)) > limits.max_text_chars:
                message = f"has {num_chars} characters, max_text_chars = {limits.max_text_chars}"
                raise_if_any([{"location": _item_path(i, j), "message": message}], TooLargeError)


def _item_path(i: int, j: int) -> str:
    """Path of a completion, or with j = −1 of the prompt."""
    return f"groups[{i}].prompt" if j < 0 else _completion_path(f"groups[{i}]", j)


def _num_chars(item: str | Text | list[Message]) -> int:
    """Characters of a text, and of a chat what its messages take in a template at least."""
    if isinstance(item, str):
        return len(item)
    if isinstance(item, Text):
        return len(item.text)
    return sum(len(message.role) + len(message.content) + _MESSAGE_CHARS for message in item)
