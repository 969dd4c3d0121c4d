"""Warm-up and memory, on a CPU with a GPU's numbers."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from shopr1_service.engine.engine import Engine
from shopr1_service.engine.forward.base import IndependentForward, PromptGroup
from shopr1_service.engine.lm_head import LinearHead
from shopr1_service.policy.warm_up import (
    CPU_PREFIX_CACHE_BYTES,
    WARM_UP_SHAPES,
    prefix_cache_bytes,
    warm_up,
)
from tests.support.models import NUM_TOKENS, head_of, rules, tiny_model

GIB = 2**30


@pytest.mark.parametrize(
    ("peak_gib", "memory_share", "expected_gib"),
    [(30, 0.5, 10), (40, 0.5, 0), (50, 0.5, 0), (10, 0.9, 62), (0, 1.0, 80)],
)
def test_prefix_cache_gets_the_memory_that_is_left(
    monkeypatch: pytest.MonkeyPatch, peak_gib: int, memory_share: float, expected_gib: int
) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(total_memory=80 * GIB)
    )
    num_bytes = prefix_cache_bytes(torch.device("cuda"), memory_share, peak_bytes=peak_gib * GIB)
    assert num_bytes == expected_gib * GIB


def test_prefix_cache_has_a_fixed_size_on_a_cpu() -> None:
    assert prefix_cache_bytes(torch.device("cpu"), 0.9, peak_bytes=10**12) == CPU_PREFIX_CACHE_BYTES


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (10, []),
        (40, [(8, 8, 32)]),
        (200, [(128, 8, 32), (136, 8, 64), (72, 16, 128), (72, 16, 128)]),
        (10**6, list(WARM_UP_SHAPES)),
    ],
)
def test_warm_up_runs_each_shape(max_tokens: int, expected: list[tuple[int, int, int]]) -> None:
    seen = []

    class RecordingForward(IndependentForward):
        def batch(self, groups: Sequence[PromptGroup]) -> list[list[torch.Tensor]]:
            [group] = groups
            assert len(set(group.suffixes)) == len(group.suffixes)  # each is computed
            own = {len(suffix.ids) + 1 for suffix in group.suffixes}
            assert len(own) == 1
            seen.append((len(group.prompt_ids), len(group.suffixes), own.pop()))
            return [[torch.zeros(len(s.positions), 32) for s in group.suffixes]]

    model = tiny_model()
    head = LinearHead(torch.zeros_like(head_of(model).weight)[:, :32])
    engine = Engine(
        RecordingForward(model), head, max_sequence_tokens=max_tokens, num_tokenizer_tokens=NUM_TOKENS
    )
    warm_up(engine, range(3, 43), rules(), max_tokens=max_tokens)
    # A shape that is too long for the policy is run with a shorter prompt.
    assert [shape for shape in seen if shape[0] > 0] == expected
