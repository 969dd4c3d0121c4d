"""Traces: arrival times of groups, and the prefixes that their prompts share. No text, no token ids.

A trace has one line per group. Its prompt is a path in the tree of all prompts: nodes, and the number of
tokens of each. Two prompts with n leading tokens in common share a path of n tokens.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from shopr1_client.wire import Message, Prompt, TokenIds
from shopr1_service.engine.prefix_cache import common_length
from shopr1_service.policy.prompts.tokenizer import Codec

FOLDER = Path(__file__).parent
TRACE = FOLDER / "trace.jsonl"
CUE_TOKENS = 32
"""Upper bound of the tokens at the end of a prompt that the next prompt of its session lacks."""
PROMPT: TypeAdapter[Prompt] = TypeAdapter(Prompt)


@dataclass(frozen=True)
class Request:
    """A group that arrived to be scored.

    Attributes:
        at_s: arrival time since the first group.
        session: number of its session. Each prompt of a session extends the previous one.
        path: nodes of the prompt, with the number of tokens of each.
        completion_tokens: of all its completions.
    """

    at_s: float
    session: int
    path: tuple[tuple[int, int], ...]
    completion_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.path)


@dataclass(frozen=True)
class LoggedGroup:
    """A group in a rollout log."""

    at_s: float
    prompt_ids: Sequence[int]
    completion_tokens: int


def read_trace(file: Path) -> list[Request]:
    """Read the groups of a trace file."""
    rows = map(json.loads, file.read_text().splitlines())
    return [Request(**{**row, "path": tuple(map(tuple, row["path"]))}) for row in rows]


def write_trace(requests: Iterable[Request], file: Path) -> None:
    """Write a trace file."""
    file.write_text("".join(json.dumps(asdict(request)) + "\n" for request in requests))
    print(f"wrote {file}")


# --- from a rollout log -----------------------------------------------------------------------------


def logged_groups(logs: Iterable[Path], codec: Codec) -> Iterator[LoggedGroup]:
    """Groups of rollout logs with text. The lines of a group are consecutive; the first has the prompt."""
    group: LoggedGroup | None = None
    for log in logs:
        for row in map(json.loads, log.read_text("utf-8").splitlines()):
            if row["rollout"] == 0:
                if group is not None:
                    yield group
                at_s = datetime.fromisoformat(row["time"]).timestamp()
                group = LoggedGroup(at_s, _prompt_ids(row["prompt"], codec), 0)
            assert group is not None
            num_tokens = len(codec.encode_ids(row["completion"]))
            group = LoggedGroup(group.at_s, group.prompt_ids, group.completion_tokens + num_tokens)
    if group is not None:
        yield group


def _prompt_ids(given: Any, codec: Codec) -> Sequence[int]:  # noqa: ANN401  # JSON
    match PROMPT.validate_python(given):
        case TokenIds(token_ids=ids):
            return ids
        case str() as text:
            return codec.encode_ids(text)
        case messages:
            chat: Sequence[Message] = messages
            return codec.encode_chat(chat)


def trace_of(groups: Iterable[LoggedGroup]) -> list[Request]:
    """Trace of these groups, in order of time."""
    ordered = sorted(groups, key=lambda group: group.at_s)
    prompts = [group.prompt_ids for group in ordered]
    return [
        Request(round(group.at_s - ordered[0].at_s, 3), session, path, group.completion_tokens)
        for group, session, path in zip(ordered, sessions_of(prompts), paths_of(prompts), strict=True)
    ]


def paths_of(prompts: Sequence[Sequence[int]]) -> list[tuple[tuple[int, int], ...]]:
    """Path of each prompt in the tree of all prompts."""
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    common = [common_length(prompts[i], prompts[k]) for i, k in pairwise(order)]
    paths: list[tuple[tuple[int, int], ...]] = [()] * len(prompts)
    nodes: dict[bytes, int] = {}
    for place, i in enumerate(order):
        # The common prefix with any other prompt in sorted order is the minimum of those in between.
        left, right = accumulate(reversed(common[:place]), min), accumulate(common[place:], min)
        cuts = sorted({*left, *right, len(prompts[i])} - {0})
        keys = [hashlib.blake2b(array("q", prompts[i][:cut]).tobytes()).digest() for cut in cuts]
        numbers = [nodes.setdefault(key, len(nodes)) for key in keys]
        paths[i] = tuple(
            (n, end - start) for n, (start, end) in zip(numbers, pairwise([0, *cuts]), strict=True)
        )
    return paths


def sessions_of(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Session of each prompt: the first one whose last prompt it extends, apart from `CUE_TOKENS`."""
    last: dict[int, Sequence[int]] = {}
    sessions = []
    for prompt in prompts:
        continued = (
            session
            for session, known in last.items()
            if len(known) < len(prompt) and common_length(known, prompt) >= len(known) - CUE_TOKENS
        )
        session = next(continued, len(last))
        last[session] = prompt
        sessions.append(session)
    return sessions
