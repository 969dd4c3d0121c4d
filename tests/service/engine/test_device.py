"""Sharing out a device's memory, and warming it up. On a CPU, given a CUDA device's numbers."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from shopr1_service.engine.device import (
    CPU_PREFIX_CACHE_BYTES,
    choose_device,
    choose_dtype,
    prefix_cache_bytes,
    token_tensor,
)
from shopr1_service.engine.engine import Engine
from shopr1_service.engine.forward.base import IndependentForward, PromptGroup
from shopr1_service.engine.lm_head import LinearHead
from shopr1_service.errors import PolicyError
from shopr1_service.policy.factory import SHAPES, warm_up
from shopr1_service.settings import DType
from tests.support.models import NUM_TOKENS, head_of, rules, tiny_model

GIB = 2**30
CUDA = torch.device("cuda")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("peak_gib", "memory_share", "expected_gib"),
    [(30, 0.5, 10), (40, 0.5, 0), (50, 0.5, 0), (10, 0.9, 62), (0, 1.0, 80)],
)
def test_prompts_get_what_is_left(
    monkeypatch: pytest.MonkeyPatch, peak_gib: int, memory_share: float, expected_gib: int
) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(total_memory=80 * GIB)
    )
    assert prefix_cache_bytes(CUDA, memory_share, peak_bytes=peak_gib * GIB) == expected_gib * GIB


def test_on_a_cpu_prompts_get_a_fixed_share() -> None:
    assert prefix_cache_bytes(CPU, 0.9, peak_bytes=10**12) == CPU_PREFIX_CACHE_BYTES


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (10, []),
        (40, [(8, 8, 32)]),
        (200, [(128, 8, 32), (136, 8, 64), (72, 16, 128), (72, 16, 128)]),
        (10**6, list(SHAPES)),
    ],
)
def test_sizes_that_are_warmed_up(max_tokens: int, expected: list[tuple[int, int, int]]) -> None:
    seen = []

    class Noting(IndependentForward):
        def batch(self, groups: Sequence[PromptGroup]) -> list[list[torch.Tensor]]:
            [group] = groups
            assert len(set(group.suffixes)) == len(group.suffixes)  # each is computed
            own = {len(suffix.ids) + 1 for suffix in group.suffixes}
            assert len(own) == 1
            seen.append((len(group.prompt_ids), len(group.suffixes), own.pop()))
            return [[torch.zeros(len(s.positions), 32) for s in group.suffixes]]

    model = tiny_model()
    head = LinearHead(torch.zeros_like(head_of(model).weight)[:, :32])
    engine = Engine(Noting(model), head, max_sequence_tokens=max_tokens, num_tokenizer_tokens=NUM_TOKENS)
    warm_up(engine, range(3, 43), rules(), max_tokens=max_tokens)
    # A small policy takes a smaller prompt of the last size that is too large for it.
    assert [shape for shape in seen if shape[0] > 0] == expected


def test_tokens() -> None:
    ids_2_T = token_tensor([[1, 2, 3], (4, 5, 6)], CPU)
    assert ids_2_T.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert ids_2_T.dtype == torch.long


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(PolicyError, match="device 'gpu'"):
        choose_device("gpu")


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_dtype(DType.FLOAT16, CPU) is torch.float16
    assert choose_dtype(DType.AUTO, CUDA) is torch.bfloat16
    for has_tiles, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_tiles=has_tiles: has_tiles)
        assert choose_dtype(DType.AUTO, CPU) is expected
