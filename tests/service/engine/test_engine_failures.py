"""Failing forwards of the engine: memory, single groups, and lost devices."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shopr1_client.wire import Reason
from shopr1_service.core import (
    Certainty,
    CompletionTokens,
    FatalEngineError,
    PromptKey,
    TokenGroup,
    Unmeasurable,
)
from shopr1_service.engine.engine import Engine
from shopr1_service.engine.forward.base import IndependentForward, PromptGroup
from shopr1_service.engine.lm_head import LinearHead
from tests.support.models import NUM_TOKENS, head_of, one_thread, random_ids, rules, tiny_model

Measured = Sequence[Certainty | Unmeasurable]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Failing(IndependentForward):
    """Raises when `fails` says so of what it is given; notes how many completions each try had, by group."""

    def __init__(self, model: PreTrainedModel, error: Exception, fails: Callable[[list[int]], bool]) -> None:
        super().__init__(model)
        self.tries: list[list[int]] = []
        self._error = error
        self._fails = fails

    def batch(self, groups: Sequence[PromptGroup]) -> list[list[Tensor]]:
        self.tries.append([len(group.suffixes) for group in groups])
        if self._fails(self.tries[-1]):
            raise self._error
        return super().batch(groups)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
]
out_of_memory = pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)


def group_of(num_completions: int, *, seed: int) -> TokenGroup:
    completions = [CompletionTokens(random_ids(5, seed=seed + i), [1, 4]) for i in range(num_completions)]
    return TokenGroup(PromptKey(random_ids(12, seed=seed)), completions)


class Bench:
    """An engine that fails, and the numbers of one that does not."""

    def __init__(self, error: Exception, fails: Callable[[list[int]], bool]) -> None:
        model = tiny_model()
        self.forward = Failing(model, error, fails)
        self.num_released = 0
        self.engine = self._engine(self.forward, model)
        self._sound = self._engine(IndependentForward(model), model)

    def _engine(self, forward: IndependentForward, model: PreTrainedModel) -> Engine:
        return Engine(
            forward,
            LinearHead(head_of(model).weight),
            max_sequence_tokens=100,
            num_tokenizer_tokens=NUM_TOKENS,
            release_memory=self._release,
        )

    def _release(self) -> None:
        self.num_released += 1

    def check(self, groups: Sequence[TokenGroup], reasons: Sequence[Sequence[Reason | None]]) -> None:
        """These reasons, and where there is none the right numbers."""
        for measured, expected, own in zip(
            self.engine.certainties(groups, rules()),
            self._sound.certainties(groups, rules()),
            reasons,
            strict=True,
        ):
            assert [m.reason if isinstance(m, Unmeasurable) else None for m in measured] == list(own)
            for one, other in zip(measured, expected, strict=True):
                if isinstance(one, Certainty):
                    assert isinstance(other, Certainty)
                    assert one.values == pytest.approx(other.values, rel=1e-5)


@out_of_memory
def test_a_group_that_is_too_large_for_memory_is_halved(error: Exception) -> None:
    bench = Bench(error, lambda tried: tried[0] > 3)
    bench.check([group_of(5, seed=1)], [[None] * 5])
    assert bench.forward.tries == [[5], [3], [2]]
    assert (bench.num_released, bench.engine.stats.num_out_of_memory) == (1, 1)


@out_of_memory
def test_halved_once_and_no_more(error: Exception) -> None:
    bench = Bench(error, lambda tried: tried[0] > 2)
    bench.check([group_of(5, seed=1)], [[Reason.OUT_OF_MEMORY] * 3 + [None] * 2])
    assert bench.forward.tries == [[5], [3], [2]]
    assert bench.engine.stats.num_out_of_memory == 2


def test_one_completion_is_tried_twice() -> None:
    fails = iter([True, False])
    bench = Bench(OUT_OF_MEMORY[0], lambda _tried: next(fails))
    bench.check([group_of(1, seed=1)], [[None]])
    assert bench.forward.tries == [[1], [1]]


def test_memory_is_released_between_the_tries() -> None:
    released: list[int] = []

    def fails(_tried: list[int]) -> bool:
        released.append(bench.num_released)
        return True

    bench = Bench(OUT_OF_MEMORY[0], fails)
    bench.check([group_of(2, seed=1)], [[Reason.OUT_OF_MEMORY] * 2])
    assert released == [0, 1, 1]


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, ZeroDivisionError()], ids=lambda e: type(e).__name__)
def test_groups_that_fail_together_are_tried_alone(error: Exception) -> None:
    bench = Bench(error, lambda tried: 2 in tried)
    failed = Reason.ENGINE_FAILURE if isinstance(error, ZeroDivisionError) else Reason.OUT_OF_MEMORY
    groups = [group_of(1, seed=1), group_of(2, seed=11), group_of(3, seed=21)]
    bench.check(groups, [[None], [failed] * 2, [None] * 3])
    assert bench.forward.tries == [[1, 2, 3], [1], [2], [3]]


def test_a_group_that_fails_alone_for_another_reason_is_not_retried() -> None:
    bench = Bench(ZeroDivisionError(), lambda _tried: True)
    bench.check([group_of(4, seed=1)], [[Reason.ENGINE_FAILURE] * 4])
    assert bench.forward.tries == [[4]]


@pytest.mark.parametrize("num_good_tries", [0, 1])
def test_a_device_that_is_gone_is_fatal(num_good_tries: int) -> None:
    errors = iter([ZeroDivisionError()] * num_good_tries)
    bench = Bench(torch.AcceleratorError("CUDA error: an illegal memory access"), lambda _tried: True)

    def fail(groups: Sequence[PromptGroup]) -> list[list[Tensor]]:
        raise next(errors, torch.AcceleratorError("CUDA error: an illegal memory access"))

    bench.forward.batch = fail  # type: ignore[method-assign]
    with pytest.raises(FatalEngineError, match="illegal memory access"):
        bench.engine.certainties([group_of(1, seed=1), group_of(1, seed=2)], rules())


def test_nothing_of_an_empty_batch() -> None:
    bench = Bench(ZeroDivisionError(), lambda _tried: True)
    bench.check([], [])
    bench.check([TokenGroup(PromptKey([1]), [])], [[]])
    assert bench.forward.tries == []
