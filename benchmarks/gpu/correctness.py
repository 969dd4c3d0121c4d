"""Correctness on the device: every forward strategy on tiny models of six families, against fp64.

The reference is independent of the service: all logits of a copy of the model in fp64, one sequence at a
time, with transformers' own attention on the CPU. The copy has the weights as rounded to the tested dtype, so
that the error is that of the computation alone.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu.models import FAMILIES, RULES, Family, on, random_ids, tiny_model, values_of
from benchmarks.gpu.results import Budget, Outcome, Results, Row, dtype_name
from shopr1_service.core import CompletionTokens, PromptKey, TokenGroup
from shopr1_service.engine.engine import Engine
from shopr1_service.engine.forward.base import (
    Forward,
    IndependentForward,
)
from shopr1_service.engine.forward.expanded import ExpandedForward
from shopr1_service.engine.forward.self_check import choose_forward
from shopr1_service.engine.forward.shared_prefix import SharedPrefixForward
from shopr1_service.engine.lm_head import choose_head
from shopr1_service.engine.prefix_cache import PrefixCache

SECTION = "correctness"
TOLERANCE_NATS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest mean absolute error per token. A lost prompt, window or scale gives far more."""
NUM_VOCAB, MAX_TOKENS = 300, 1024
CACHE_BYTES = 2**30
RESERVED_S = 1.0

STRATEGIES: Mapping[str, Callable[[PreTrainedModel], Forward]] = {
    "shared_prefix": lambda model: SharedPrefixForward(model, PrefixCache(CACHE_BYTES)),
    "expanded": ExpandedForward,
    "independent": IndependentForward,
}


def check_numbers(device: torch.device, budget: Budget, results: Results) -> None:
    """Check every family in both dtypes."""
    for (name, family), dtype in itertools.product(FAMILIES.items(), TOLERANCE_NATS):
        if budget.remaining_s < RESERVED_S:
            results.add(Row(SECTION, name, "all", dtype_name(dtype), Outcome.SKIPPED, note="no time left"))
            continue
        for row in _check_family(name, family, device, dtype):
            results.add(row)


def _check_family(name: str, family: Family, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    model = tiny_model(family, dtype)
    batches = _batches()
    expected_T = _reference(model, [group for batch in batches for group in batch])
    on(model, device)
    for method, make in STRATEGIES.items():
        row = Row(SECTION, name, method, dtype_name(dtype), Outcome.FAIL)
        yield _comparison(row, model, make(model), batches, expected_T)
    yield _choice(Row(SECTION, name, "self-check", dtype_name(dtype), Outcome.FAIL), model)


# --- rows -------------------------------------------------------------------------------------------


def _comparison(
    row: Row,
    model: PreTrainedModel,
    forward: Forward,
    batches: Sequence[Sequence[TokenGroup]],
    expected_T: Tensor,
) -> Row:
    """Values of the engine with one strategy, against the reference."""
    limit = TOLERANCE_NATS[model.dtype]
    try:
        head = choose_head(model, _ids_tensor(random_ids(24, NUM_VOCAB, seed=7), model.device))
        engine = Engine(forward, head, max_sequence_tokens=MAX_TOKENS, num_tokenizer_tokens=NUM_VOCAB)
        measured = [group for batch in batches for group in engine.certainties(batch, RULES)]
        error = float((values_of(measured) - expected_T).abs().mean())
    except Exception as failure:  # a row must not end the run
        return replace(row, note=f"{type(failure).__name__}: {failure}")
    outcome = Outcome.PASS if error <= limit else Outcome.FAIL
    return replace(row, outcome=outcome, error_nats=error, tolerance_nats=limit)


def _choice(row: Row, model: PreTrainedModel) -> Row:
    """The strategy that the service's self-check chooses on this device."""
    candidates = [make(model) for name, make in STRATEGIES.items() if name != "independent"]
    chosen = choose_forward(model, random_ids(48, NUM_VOCAB, seed=3), candidates).forward.name
    fastest = next(iter(STRATEGIES))
    outcome = Outcome.PASS if chosen == fastest else Outcome.FAIL
    return replace(row, outcome=outcome, note=f"chose {chosen}, expected {fastest}")


# --- groups and values ------------------------------------------------------------------------------


def _batches() -> list[list[TokenGroup]]:
    """Passes of an engine: a new prompt, the same one again, an extended one, and several together."""
    prompt = random_ids(150, NUM_VOCAB, seed=10)
    lead, tail = random_ids(6, NUM_VOCAB, seed=11), random_ids(20, NUM_VOCAB, seed=12)
    first = TokenGroup(
        PromptKey(prompt),
        [
            CompletionTokens([*lead, *tail], range(6, 26)),
            CompletionTokens([*lead, *reversed(tail)], [6, 9, 10, 25]),
            CompletionTokens([*lead, *tail[5:8]], range(9)),
            CompletionTokens(tail[:2], [0]),
        ],
    )
    extended = TokenGroup(PromptKey([*prompt, *tail[:10]]), first.completions[:2])
    short = TokenGroup(PromptKey(random_ids(5, NUM_VOCAB, seed=13)), first.completions)
    return [[first], [first], [extended], [first, short, extended]]


def _reference(model: PreTrainedModel, groups: Sequence[TokenGroup]) -> Tensor:
    """KL(U‖p) in nats of every measured token, from all logits of each sequence, fp64."""
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    exact.set_experts_implementation("eager")
    values = [
        _full_logits_values(exact, group.prompt_ids, completion)
        for group in groups
        for completion in group.completions
    ]
    return torch.cat(values)


@torch.no_grad()
def _full_logits_values(
    model: PreTrainedModel, prompt_ids: Sequence[int], completion: CompletionTokens
) -> Tensor:
    ids_1_T = _ids_tensor([*prompt_ids, *completion.ids], model.device)
    logits_T_V = model(input_ids=ids_1_T, use_cache=False).logits[0]
    z_T_V = logits_T_V[[len(prompt_ids) + index - 1 for index in completion.measured]]
    values_T: Tensor = z_T_V.logsumexp(-1) - z_T_V.mean(-1) - math.log(z_T_V.shape[-1])
    return values_T


def _ids_tensor(ids: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([ids], device=device)
