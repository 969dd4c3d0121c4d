"""Traces: shared prefixes of prompts, and traces from rollout logs."""

import json
from itertools import combinations, takewhile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.capacity.engine import Group
from benchmarks.capacity.trace import (
    TRACE,
    logged_groups,
    paths_of,
    read_trace,
    sessions_of,
    trace_of,
    write_trace,
)
from shopr1_service.cluster.prefix_affinity import BLOCK_TOKENS, Work
from shopr1_service.engine.prefix_cache import common_length
from shopr1_service.policy.fake import CharacterCodec

PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=6)
HOME = [0] * 60
CUE = [9, 9, 9]


def in_common(some: tuple[tuple[int, int], ...], others: tuple[tuple[int, int], ...]) -> int:
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(some, others, strict=False))
    return sum(num_tokens for (_, num_tokens), _ in pairs)


@given(PROMPTS)
def test_paths_share_what_prompts_share(prompts: list[list[int]]) -> None:
    paths = paths_of(prompts)
    for i, k in combinations(range(len(prompts)), 2):
        assert in_common(paths[i], paths[k]) == common_length(prompts[i], prompts[k])
    assert [sum(size for _, size in path) for path in paths] == list(map(len, prompts))


@given(PROMPTS)
def test_router_sees_the_same_blocks_in_both(short: list[list[int]]) -> None:
    prompts = [[token for token in prompt for _ in range(BLOCK_TOKENS // 2)] for prompt in short]
    real = [Work.of(prompt, 5) for prompt in prompts]
    simulated = [Group(path, 5).work() for path in paths_of(prompts)]
    assert [len(work.blocks) for work in simulated] == [len(work.blocks) for work in real]
    for i, k in combinations(range(len(prompts)), 2):
        alike = [x == y for x, y in zip(real[i].blocks, real[k].blocks, strict=False)]
        assert alike == [x == y for x, y in zip(simulated[i].blocks, simulated[k].blocks, strict=False)]


def test_session_continues() -> None:
    first, second = [*HOME, 1], [*HOME, 2]
    prompts = [[*HOME, *CUE], [*first, *CUE], [*HOME, *CUE], [*second, *CUE], [*first, *HOME, *CUE]]
    assert sessions_of(prompts) == [0, 0, 1, 1, 0]


def line(second: int, rollout: int, completion: str, prompt: Any = None) -> str:
    row = {"time": f"2026-11-25T15:40:{second:02}.500000Z", "rollout": rollout, "completion": completion}
    return json.dumps({**row, "prompt": prompt}) + "\n"


def test_rollout_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    chat = [{"role": "user", "content": "ab"}]  # `user: ab`, and a line break
    lines = [
        line(20, 0, "xyz", "abcd"),
        line(20, 1, "x", None),
        line(22, 0, "", {"token_ids": [97, 98]}),
        line(21, 0, "xx", chat),
    ]
    log.write_text("".join(lines))
    trace = trace_of(logged_groups([log], CharacterCodec()))
    assert [(request.at_s, request.prompt_tokens, request.completion_tokens) for request in trace] == [
        (0.0, 4, 4),
        (1.0, 9, 2),
        (2.0, 2, 0),
    ]
    assert in_common(trace[0].path, trace[2].path) == 2
    write_trace(trace, tmp_path / "trace.jsonl")
    assert read_trace(tmp_path / "trace.jsonl") == trace


def test_recorded_trace_can_be_read() -> None:
    trace = read_trace(TRACE)
    assert len(trace) > 50
    assert all(request.completion_tokens > 0 and request.prompt_tokens > 0 for request in trace)
