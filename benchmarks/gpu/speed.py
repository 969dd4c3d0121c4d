"""Speed on the device: the engine against full logits and `logits_to_keep`.

The engine runs without a prefix cache, so that every round computes the prompt. Both baselines run a batch of
whole sequences, in parts if it does not fit into memory.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.engine.baselines import batch_certainties
from benchmarks.gpu.models import engine_values, random_group
from benchmarks.gpu.results import Budget, Outcome, Results, Row, dtype_name
from benchmarks.meters import (
    batch_flop,
    free_bytes,
    interleaved_s,
    matmul_flop_per_s,
    needed_flop,
    peak_bytes,
)
from benchmarks.report import device_name
from benchmarks.workloads import Shape
from shopr1_service.core import TokenGroup
from shopr1_service.policy.loaded_policy import LoadedPolicy

SHAPES = (Shape(2000, 8, 64), Shape(8000, 16, 64), Shape(32_000, 16, 100))
TINY_SHAPES = (Shape(48, 2, 8), Shape(64, 3, 8), Shape(96, 4, 8))
TINY_MATMUL_SIZE = 256
NUM_ROUNDS = 5
MAX_CELL_S = 45.0
"""No further round of a method and shape starts after this time."""
MIN_CELL_S = 1.0
"""With less time left, a method is skipped."""
MEMORY_SHARE = 0.7
"""Share of free memory for a batch. A larger batch is split by completions."""
TOLERANCE_NATS = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""Largest mean absolute difference between the engine and a baseline per token."""
PEAK_FLOP_PER_S = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "RTX 4090": 165e12,
    "A10": 125e12,
    "L4": 121e12,
}
"""Dense bfloat16 by NVIDIA's data sheets. The first name that is part of the device's name counts."""


@dataclass(frozen=True)
class Method:
    """A way to compute the self-certainty of a group.

    Attributes:
        run: returns one value per measured token, fp64 on the CPU.
        flop: FLOPs that it needs for a shape.
    """

    name: str
    run: Callable[[TokenGroup], Tensor]
    flop: Callable[[Shape], float]
    is_engine: bool = False


def measure_speed(
    policy: LoadedPolicy, shapes: Sequence[Shape], budget: Budget, reserved_s: float, results: Results
) -> None:
    """Measure all methods at all shapes, as far as the budget allows.

    Args:
        shapes: the smallest first.
        reserved_s: time to leave for later steps.
    """
    rates: dict[str, float] = {}
    matmul = None
    if budget.remaining_s > MIN_CELL_S:
        matmul = matmul_flop_per_s(
            policy.model.device, policy.model.dtype, TINY_MATMUL_SIZE if shapes is TINY_SHAPES else None
        )
        results.add(_matmul(policy.model, matmul))
    for shape in shapes:
        _measure_shape(shape, policy, rates, matmul, budget, reserved_s, results)


# --- the table --------------------------------------------------------------------------------------


def _methods(policy: LoadedPolicy) -> Sequence[Method]:
    """The engine first: the baselines are compared with it."""
    model = policy.model
    engine = Method(
        f"engine ({policy.info.forward})",
        run=partial(engine_values, policy),
        flop=partial(needed_flop, model),
        is_engine=True,
    )
    baselines = [
        Method(name, Baseline(model, keeps_all=keeps_all), partial(batch_flop, model, keeps_all=keeps_all))
        for name, keeps_all in (("logits_to_keep", False), ("full logits", True))
    ]
    return [engine, *baselines]


def _measure_shape(
    shape: Shape,
    policy: LoadedPolicy,
    rates: dict[str, float],
    matmul: float | None,
    budget: Budget,
    reserved_s: float,
    results: Results,
) -> None:
    model, engine_T, engine_s = policy.model, None, None
    group = random_group(shape, model.config.vocab_size, seed=shape.P)
    for method in _methods(policy):
        row = Row("speed", str(shape), method.name, dtype_name(model.dtype), Outcome.SKIPPED)
        remaining_s, needed_s = budget.remaining_s - reserved_s, 2 * _expected_s(method, shape, rates)
        if remaining_s < max(MIN_CELL_S, needed_s):
            results.add(replace(row, note=f"needs {needed_s:.0f} s, {max(0.0, remaining_s):.0f} s are left"))
            continue
        row, values_T = _measured(row, method, shape, group, model, min(MAX_CELL_S, remaining_s))
        if row.time_s:
            rates[method.name] = method.flop(shape) / row.time_s
            row = replace(row, note=_note(policy, method, row.time_s, rates, matmul, engine_s))
        if engine_T is not None and values_T is not None:
            row = _compared(row, values_T, engine_T, TOLERANCE_NATS[model.dtype])
        if method.is_engine:
            engine_T, engine_s = values_T, row.time_s
        results.add(row)


def _note(
    policy: LoadedPolicy,
    method: Method,
    time_s: float,
    rates: Mapping[str, float],
    matmul: float | None,
    engine_s: float | None,
) -> str:
    """The engine's share of a plain matrix product, and its kernels; of others the ratio to its time."""
    if not method.is_engine:
        return "" if engine_s is None else f"{time_s / engine_s:.3g} x the engine's time"
    share = "" if matmul is None else f"{rates[method.name] / matmul:.2g} of matmul, "
    return f"{share}head {policy.info.head}, attention {policy.info.attention}"


def _measured(
    row: Row, method: Method, shape: Shape, group: TokenGroup, model: PreTrainedModel, limit_s: float
) -> tuple[Row, Tensor | None]:
    """Row and values of one method. The first run gives the values and the peak memory."""
    values: list[Tensor] = []
    try:
        start_s = time.perf_counter()
        num_bytes = peak_bytes(lambda: values.append(method.run(group)), model.device)
        num_rounds, median_s = _rounds(lambda: method.run(group), limit_s - (time.perf_counter() - start_s))
    except torch.OutOfMemoryError:
        return replace(row, note="out of memory, even one completion at a time"), None
    except Exception as error:  # a row must not end the run
        return replace(row, outcome=Outcome.FAIL, note=f"{type(error).__name__}: {error}"), None
    peak = _peak_flop_per_s(model)
    share = method.flop(shape) / median_s / peak if peak else None
    return replace(
        row,
        outcome=Outcome.MEASURED,
        time_s=median_s,
        peak_gib=num_bytes / 2**30,
        peak_flop_share=share,
        rounds=num_rounds,
    ), values[0]


def _rounds(call: Callable[[], object], budget_s: float) -> tuple[int, float]:
    """Number of timed rounds, at least one, and their median."""
    num_calls = 0

    def counted() -> None:
        nonlocal num_calls
        num_calls += 1
        call()

    [median_s] = interleaved_s(NUM_ROUNDS, counted, budget_s=budget_s)
    return num_calls, median_s


def _compared(row: Row, values_T: Tensor, engine_T: Tensor, limit: float) -> Row:
    """The difference to the engine decides whether the row passes."""
    error = float((values_T - engine_T).abs().mean())
    outcome = Outcome.PASS if error <= limit else Outcome.FAIL
    return replace(row, outcome=outcome, error_nats=error, tolerance_nats=limit)


def _expected_s(method: Method, shape: Shape, rates: Mapping[str, float]) -> float:
    """Expected duration at the method's last rate, or at the lowest one. 0 if nothing is measured yet.

    Args:
        rates: FLOP/s by method.
    """
    rate = rates.get(method.name) or min(rates.values(), default=math.inf)
    return method.flop(shape) / rate


def _matmul(model: PreTrainedModel, flop_per_s: float) -> Row:
    """FLOP/s of matrix products alone, as a share of the device's peak."""
    peak = _peak_flop_per_s(model)
    share = flop_per_s / peak if peak else None
    row = Row("speed", "machine", "matmul", dtype_name(model.dtype), Outcome.MEASURED, peak_flop_share=share)
    return replace(row, note=f"{flop_per_s / 1e12:.4g} TFLOP/s")


def _peak_flop_per_s(model: PreTrainedModel) -> float | None:
    is_known = model.device.type == "cuda" and model.dtype == torch.bfloat16
    name = device_name(model.device) if is_known else ""
    return next((peak for part, peak in PEAK_FLOP_PER_S.items() if part in name), None)


# --- the baselines ----------------------------------------------------------------------------------


class Baseline:
    """Batches of whole sequences, as large as memory allows. Out of memory halves them from then on."""

    def __init__(self, model: PreTrainedModel, *, keeps_all: bool) -> None:
        self._model = model
        self._keeps_all = keeps_all
        self._max_rows: int | None = None

    def __call__(self, group: TokenGroup) -> Tensor:
        """Values of a group, fp64."""
        num_rows = min(len(group.completions), self._max_rows or self._num_fitting(group))
        while True:
            self._max_rows = num_rows
            try:
                return self._values(group, num_rows)
            except torch.OutOfMemoryError:
                if num_rows == 1:
                    raise
            num_rows //= 2
            torch.cuda.empty_cache()

    def _values(self, group: TokenGroup, num_rows: int) -> Tensor:
        parts = [
            TokenGroup(group.prompt, group.completions[start : start + num_rows])
            for start in range(0, len(group.completions), num_rows)
        ]
        values = [batch_certainties(self._model, part, keeps_all=self._keeps_all) for part in parts]
        return torch.cat([value_T.double().cpu() for part in values for value_T in part])

    def _num_fitting(self, group: TokenGroup) -> int:
        """Number of sequences whose logits and activations of one layer fit into memory."""
        config = self._model.config
        num_tokens = len(group.prompt_ids) + len(group.completions[0].ids)
        num_numbers = 3 * config.intermediate_size + 8 * config.hidden_size
        if self._keeps_all:
            num_numbers += config.vocab_size
        row_bytes = num_tokens * num_numbers * self._model.dtype.itemsize
        return max(1, int(MEMORY_SHARE * free_bytes(self._model.device) / row_bytes))
