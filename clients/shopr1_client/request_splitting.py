"""Splitting of large requests into parts for one or several servers, and merging of their answers.

A part holds whole groups where possible. A group with more completions than a server accepts is cut; its
rewards are joined in the answer, provided that the same policy version scored all of them.

Groups with the same prompt go to the same server, whose prefix cache has the prompt. Rendezvous hashing: each
server's weight for a prompt is a hash of both, and the heaviest comes first. When a server is added or
removed, only its own share of the prompts moves.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shopr1_client.errors import PolicyVersionError, ProblemError, TransportError
from shopr1_client.wire import Group, GroupScore, Limits, ScoreRequest, ScoreResponse


def ranked(urls: Sequence[str], key: bytes) -> list[str]:
    """The servers in the order in which to try them for this key."""
    return sorted(urls, key=lambda url: hashlib.blake2b(key, key=_digest(url)).digest(), reverse=True)


def _digest(url: str) -> bytes:
    return hashlib.blake2b(url.encode(), digest_size=32).digest()


MAX_PART_GROUPS = 32
"""Small enough that little is repeated when a server fails, large enough to keep a server busy."""
DEFAULT_LIMITS = Limits(
    max_body_bytes=64 * 2**20, max_groups=1024, max_completions_per_group=256, max_request_tokens=4 * 2**20
)
"""The server's defaults, which save a question before a request of one part."""

_ENVELOPE_BYTES = 1024
_LOCATION = re.compile(r"groups\[(\d+)\](?:\.completions\[(\d+)\])?")


@dataclass(frozen=True)
class _Piece:
    """A group, or some of its completions, as JSON."""

    index: int
    first: int
    num_completions: int
    content: bytes
    num_tokens: int
    urls: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A request to one server.

    Attributes:
        body: the request's JSON.
        urls: the servers in the order in which to try them.
    """

    body: bytes
    urls: Sequence[str]
    pieces: Sequence[_Piece]

    @property
    def num_rollouts(self) -> int:
        return sum(piece.num_completions for piece in self.pieces)


def split(request: ScoreRequest, limits: Limits, urls: Sequence[str]) -> list[Part]:
    """Split into parts within the limits, at least one. The server rejects single pieces beyond them."""
    pieces_of: dict[tuple[str, ...], list[_Piece]] = {}
    for index, group in enumerate(request.groups):
        for piece in _pieces(index, group, limits, urls):
            pieces_of.setdefault(piece.urls[:1], []).append(piece)
    parts = [_part(request, batch) for pieces in pieces_of.values() for batch in _batches(pieces, limits)]
    return parts or [Part(_body(request, []), list(urls), [])]


def _pieces(index: int, group: Group, limits: Limits, urls: Sequence[str]) -> Iterator[_Piece]:
    # Not `exclude_none`, which would drop null arguments of a chat template, too.
    fields = {name: value for name, value in group.model_dump(mode="python").items() if value is not None}
    completions = fields.pop("completions")
    prompt = json.dumps(fields["prompt"])
    servers = tuple(ranked(urls, prompt.encode()))
    step = limits.max_completions_per_group
    for first in range(0, max(1, len(completions)), step):
        own = completions[first : first + step]
        # json escapes half surrogate pairs, which a policy may have written; pydantic rejects them.
        content = json.dumps({**fields, "completions": own}).encode()
        prompt_tokens = _num_tokens(fields["prompt"]) + _num_tokens(fields.get("chat_template_kwargs", ""))
        num_tokens = prompt_tokens + sum(map(_num_tokens, own))
        yield _Piece(index, first, len(own), content, num_tokens, servers)


def _num_tokens(text_or_ids: Any) -> int:  # noqa: ANN401  # a prompt or a completion
    """Upper bound of the number of tokens: no tokenizer makes more tokens of a text than it has bytes."""
    if isinstance(text_or_ids, Mapping) and "token_ids" in text_or_ids:
        return len(text_or_ids["token_ids"])
    is_ascii = isinstance(text_or_ids, str) and text_or_ids.isascii()
    return len(text_or_ids if is_ascii else json.dumps(text_or_ids))


def _batches(pieces: Sequence[_Piece], limits: Limits) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    num_bytes, num_tokens = _ENVELOPE_BYTES, 0
    for piece in pieces:
        fits = (
            len(batch) < min(limits.max_groups, MAX_PART_GROUPS)
            and num_bytes + len(piece.content) < limits.max_body_bytes
            and num_tokens + piece.num_tokens <= limits.max_request_tokens
        )
        if batch and not fits:
            yield batch
            batch, num_bytes, num_tokens = [], _ENVELOPE_BYTES, 0
        batch.append(piece)
        num_bytes += len(piece.content) + 1
        num_tokens += piece.num_tokens
    yield batch


def _part(request: ScoreRequest, pieces: Sequence[_Piece]) -> Part:
    return Part(_body(request, [piece.content for piece in pieces]), pieces[0].urls, pieces)


def _body(request: ScoreRequest, groups: Sequence[bytes]) -> bytes:
    envelope = request.model_dump(mode="json", exclude_none=True, exclude={"groups", "chat_template_kwargs"})
    if request.chat_template_kwargs is not None:  # with its null arguments
        envelope["chat_template_kwargs"] = request.chat_template_kwargs
    return b'{"groups": [' + b", ".join(groups) + b"], " + json.dumps(envelope).encode()[1:]


def check(part: Part, answer: ScoreResponse) -> ScoreResponse:
    """Check that the answer has a reward for every rollout, and return it.

    Raises:
        TransportError: it does not.
    """
    counts = [len(score.rewards) for score in answer.groups]
    if counts != [piece.num_completions for piece in part.pieces]:
        raise TransportError(f"the answer has {counts} rewards, not one for each completion")
    return answer


def merge(request: ScoreRequest, parts: Sequence[Part], answers: Sequence[ScoreResponse]) -> ScoreResponse:
    """Merge the parts' answers into one.

    Raises:
        TransportError: the servers use different recipes.
        PolicyVersionError: the policy changed between the parts of a group.
    """
    if len(answers) == 1:
        return answers[0]
    if len({answer.recipe.digest for answer in answers}) > 1:
        raise TransportError("the servers use different recipes of the same name")
    scores: dict[int, list[tuple[int, GroupScore]]] = {}
    for part, answer in zip(parts, answers, strict=True):
        for piece, score in zip(part.pieces, answer.groups, strict=True):
            scores.setdefault(piece.index, []).append((piece.first, score))
    groups = [_joined(scores[index]) for index in range(len(request.groups))]
    newest = max((answer.policy for answer in answers), key=lambda policy: policy.number)
    return answers[0].model_copy(update={"policy": newest, "groups": groups})


def _joined(scores: list[tuple[int, GroupScore]]) -> GroupScore:
    ordered = [score for _, score in sorted(scores, key=lambda pair: pair[0])]
    # Not by number: each server has its own count, and weights that are sent again are the same weights.
    if len({(score.policy_version, score.adapter) for score in ordered}) > 1:
        raise PolicyVersionError("the policy changed while a group was scored in several parts")
    rewards = [reward for score in ordered for reward in score.rewards]
    warnings = list(dict.fromkeys(warning for score in ordered for warning in score.warnings))
    return ordered[0].model_copy(update={"rewards": rewards, "warnings": warnings})


def relocated(error: ProblemError, part: Part) -> ProblemError:
    """The same error, with the fields' locations in the whole request."""
    error.relocate(lambda text: _LOCATION.sub(lambda match: _location(match, part), text))
    return error


def _location(match: "re.Match[str]", part: Part) -> str:
    if int(match[1]) >= len(part.pieces):
        return match[0]
    piece = part.pieces[int(match[1])]
    completion = "" if match[2] is None else f".completions[{piece.first + int(match[2])}]"
    return f"groups[{piece.index}]{completion}"
