"""Traces: when groups came to be scored, and what they have in common. No text, no ids of tokens.

python benchmarks/traces.py LOG ... makes one from rollout logs of a service (`rollout_log_text = true`).
Without logs it records one: a walk through a shop (`walk.py`) is scored by a real service with a real policy.

A line is a group. Its prompt is a path in the tree of all prompts: nodes, and how many tokens are theirs. So
prompts with the first n tokens in common have a path in common that is n tokens long.
"""

import argparse
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
from shopr1_service.policy.tokenizer import Codec

FOLDER = Path(__file__).parent
TRACE = FOLDER / "trace.jsonl"
CUE_TOKENS = 32
"""More than what stands at the end of a prompt and not in the next one of its session."""
PROMPT: TypeAdapter[Prompt] = TypeAdapter(Prompt)


@dataclass(frozen=True)
class Request:
    """A group that was to be scored.

    Attributes:
        at_s: since the first one.
        session: prompts of a session each begin with the last one.
        path: nodes of the prompt, with the number of their tokens.
        own_tokens: of its completions.
    """

    at_s: float
    session: int
    path: tuple[tuple[int, int], ...]
    own_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.path)


@dataclass(frozen=True)
class Scored:
    """What a rollout log says of a group."""

    at_s: float
    prompt_ids: Sequence[int]
    own_tokens: int


def read_trace(file: Path) -> list[Request]:
    rows = map(json.loads, file.read_text().splitlines())
    return [Request(**{**row, "path": tuple(map(tuple, row["path"]))}) for row in rows]


def write_trace(requests: Iterable[Request], file: Path) -> None:
    file.write_text("".join(json.dumps(asdict(request)) + "\n" for request in requests))
    print(f"wrote {file}")


# --- from a rollout log -----------------------------------------------------------------------------


def scored_groups(logs: Iterable[Path], codec: Codec) -> Iterator[Scored]:
    """The groups of rollout logs with text. Their lines lie together, the first has the prompt."""
    group: Scored | None = None
    for log in logs:
        for row in map(json.loads, log.read_text("utf-8").splitlines()):
            if row["rollout"] == 0:
                if group is not None:
                    yield group
                at_s = datetime.fromisoformat(row["time"]).timestamp()
                group = Scored(at_s, _prompt_ids(row["prompt"], codec), 0)
            assert group is not None
            num_tokens = len(codec.encode_ids(row["completion"]))
            group = Scored(group.at_s, group.prompt_ids, group.own_tokens + num_tokens)
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


def trace_of(groups: Iterable[Scored]) -> list[Request]:
    """A trace of what was scored, in order of time."""
    ordered = sorted(groups, key=lambda group: group.at_s)
    prompts = [group.prompt_ids for group in ordered]
    return [
        Request(round(group.at_s - ordered[0].at_s, 3), session, path, group.own_tokens)
        for group, session, path in zip(ordered, sessions_of(prompts), paths_of(prompts), strict=True)
    ]


def paths_of(prompts: Sequence[Sequence[int]]) -> list[tuple[tuple[int, int], ...]]:
    """Each prompt's way in the tree of all."""
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    common = [common_length(prompts[i], prompts[k]) for i, k in pairwise(order)]
    paths: list[tuple[tuple[int, int], ...]] = [()] * len(prompts)
    nodes: dict[bytes, int] = {}
    for place, i in enumerate(order):
        # What a sorted prompt has in common with those before it: the least on the way to them. So behind it.
        before, behind = accumulate(reversed(common[:place]), min), accumulate(common[place:], min)
        cuts = sorted({*before, *behind, len(prompts[i])} - {0})
        keys = [hashlib.blake2b(array("q", prompts[i][:cut]).tobytes()).digest() for cut in cuts]
        numbers = [nodes.setdefault(key, len(nodes)) for key in keys]
        paths[i] = tuple(
            (n, end - start) for n, (start, end) in zip(numbers, pairwise([0, *cuts]), strict=True)
        )
    return paths


def sessions_of(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Which session each prompt goes on: one whose last prompt it begins with, but for its end."""
    last: dict[int, Sequence[int]] = {}
    sessions = []
    for prompt in prompts:
        goes_on = (
            session
            for session, known in last.items()
            if len(known) < len(prompt) and common_length(known, prompt) >= len(known) - CUE_TOKENS
        )
        session = next(goes_on, len(last))
        last[session] = prompt
        sessions.append(session)
    return sessions


def main() -> None:
    from walk import recorded_walk  # only here is a policy loaded

    parser = argparse.ArgumentParser(description="Makes a trace for the simulation.")
    parser.add_argument("logs", nargs="*", type=Path, metavar="LOG", help="rollout logs with text")
    parser.add_argument("--output", type=Path, default=TRACE)
    options = parser.parse_args()
    write_trace(recorded_walk(options.logs), options.output)


if __name__ == "__main__":
    main()
