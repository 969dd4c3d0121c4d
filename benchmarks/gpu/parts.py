"""Variants of the head and of attention, which of them the service has chosen, and waits of a pass.

A variant that fails or is wrong is no failure of the service, which does not choose it. The chosen one must
be right.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.models import Family, on, random_group, random_ids, tiny_model
from benchmarks.gpu.results import Budget, Outcome, Results, Row, dtype_name
from benchmarks.meters import median_s, peak_bytes
from benchmarks.workloads import Shape
from shopr1_rewards.recipe import Divergence
from shopr1_rewards.self_certainty import divergences
from shopr1_service.engine.attention.choice import TOLERANCE, kernel_error
from shopr1_service.engine.attention.kernels import OPEN, attend, kernels_of
from shopr1_service.engine.forward.base import PromptGroup, Suffix
from shopr1_service.engine.forward.shared_prefix import SharedPrefixForward
from shopr1_service.engine.fused_head.choice import (
    TOLERANCE_NATS,
    error_nats,
    exact_values,
    reductions,
    variants,
)
from shopr1_service.engine.lm_head import LinearHead, choose_head, trunk_of
from shopr1_service.engine.prefix_cache import PrefixCache
from shopr1_service.policy.loaded_policy import LoadedPolicy

RESERVED_S = 30.0
NUM_ROUNDS = 5
NUM_CHECKED = 24
CUDNN = "cudnn"
"""Attention that the service does not use, because it was not tested on a GPU: is it worth it?"""
_LAYERS = (2, 4)


def measure_parts(policy: LoadedPolicy, budget: Budget, results: Results, *, is_tiny: bool) -> None:
    """Rows of the sections `head`, `attention` and `waits`."""
    num_tokens, reserved_s = (64, 1.0) if is_tiny else (1024, RESERVED_S)
    if budget.remaining_s < reserved_s:
        row = Row("head", "all", "all", dtype_name(policy.model.dtype), Outcome.SKIPPED, note="no time left")
        results.add(row)
        return
    for row in (*_heads(policy, num_tokens), *_attentions(policy, 4 * num_tokens), _waits(policy)):
        results.add(row)


# --- the head ---------------------------------------------------------------------------------------


@torch.inference_mode()
def _heads(policy: LoadedPolicy, num_tokens: int) -> Iterator[Row]:
    model = policy.model
    ids_1_T = torch.tensor([random_ids(num_tokens, model.config.vocab_size, seed=5)], device=model.device)
    head = choose_head(model, ids_1_T[:, :NUM_CHECKED])
    assert isinstance(head, LinearHead)
    hidden_T_H = trunk_of(model)(input_ids=ids_1_T, use_cache=False).last_hidden_state[0]
    expected = exact_values(head, hidden_T_H[:NUM_CHECKED])
    candidates = reductions() if model.device.type == "cuda" else {}
    for name, way in variants(head, candidates).items():
        row = Row("head", f"{num_tokens} tokens", name, dtype_name(model.dtype), Outcome.MEASURED)
        yield _measured(
            row,
            partial(error_nats, way, hidden_T_H[:NUM_CHECKED], expected),
            partial(divergences, hidden_T_H, way, Divergence.KL_U_P),
            TOLERANCE_NATS,
            model.device,
            is_chosen=name == policy.info.head,
        )


# --- attention --------------------------------------------------------------------------------------


@torch.inference_mode()
def _attentions(policy: LoadedPolicy, num_tokens: int) -> Iterator[Row]:
    """Causal attention of a segment to itself, and attention of its tokens to as many of a prefix."""
    model = policy.model
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    query = torch.randn(1, num_heads, num_tokens, head_size, device=model.device).to(model.dtype)
    key, value = torch.randn(2, 1, num_kv_heads, num_tokens, head_size, device=model.device).to(model.dtype)
    for is_causal in (True, False):
        workload = f"{'own' if is_causal else 'prefix'} {num_tokens}"
        for name in (*kernels_of(model.device, model.dtype), *_unused(model.device, model.dtype)):
            row = Row("attention", workload, name, dtype_name(model.dtype), Outcome.MEASURED)
            run = _cudnn if name == CUDNN else _kernel(name)
            inputs = (query, key, value, is_causal)
            yield _measured(
                row,
                partial(_attention_error, name, run, *inputs),
                partial(run, *inputs),
                TOLERANCE[model.dtype],
                model.device,
                is_chosen=name in policy.info.attention,
            )


_Run = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def _unused(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    return (CUDNN,) if device.type == "cuda" and dtype != torch.float32 else ()


def _kernel(name: str) -> _Run:
    return lambda query, key, value, is_causal: attend(
        query, key, value, None, is_causal=is_causal, kernel=name
    )


def _cudnn(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = op(query, key, value, None, True, 0.0, is_causal)
    return out, lse.reshape(query.shape[:-1])


def _attention_error(
    name: str, run: _Run, query: Tensor, key: Tensor, value: Tensor, is_causal: bool
) -> float:
    """The error against fp64; of a kernel that the service does not use, the difference from `open`."""
    if name != CUDNN:
        return kernel_error(name, query.shape[1], key.shape[1], query.shape[-1], query)
    query, key, value = (tensor[:, :, :200] for tensor in (query, key, value))
    expected = _kernel(OPEN)(query, key, value, is_causal)
    pairs = zip(run(query, key, value, is_causal), expected, strict=True)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def _measured(
    row: Row,
    error: Callable[[], float],
    call: Callable[[], object],
    limit: float,
    device: torch.device,
    *,
    is_chosen: bool,
) -> Row:
    """Error, time and memory of a variant. Only the chosen one can fail."""
    bad = Outcome.FAIL if is_chosen else Outcome.MEASURED
    note = "chosen" if is_chosen else ""
    try:
        largest = error()
        num_bytes = peak_bytes(call, device)
        time_s = median_s(NUM_ROUNDS, call)
    except torch.AcceleratorError:
        raise
    except Exception as failure:  # a row must not end the run
        return replace(row, outcome=bad, note=f"{note} {type(failure).__name__}: {failure}".strip())
    return replace(
        row,
        outcome=Outcome.PASS if largest <= limit else bad,
        time_s=time_s,
        peak_gib=num_bytes / 2**30,
        rounds=NUM_ROUNDS,
        error_nats=largest,
        tolerance_nats=limit,
        note=note if largest <= limit else f"{note} not right".strip(),
    )


# --- waits ------------------------------------------------------------------------------------------


def _waits(policy: LoadedPolicy) -> Row:
    """Waits of the host for the device in the passes of a group: as many with more layers."""
    device = policy.model.device
    counts = [num_waits(_passes(num_layers, device), device) for num_layers in _LAYERS]
    shown = ", ".join(f"{count} with {num} layers" for count, num in zip(counts, _LAYERS, strict=True))
    row = Row("waits", "windows of 8", "shared_prefix", dtype_name(policy.model.dtype), Outcome.FAIL)
    return replace(row, outcome=Outcome.PASS if len(set(counts)) == 1 else Outcome.FAIL, note=shown)


def _passes(num_layers: int, device: torch.device) -> Callable[[], object]:
    """The passes of a group whose segments are longer than the model's windows."""
    family = Family("mistral", {"sliding_window": 8, "num_hidden_layers": num_layers})
    model = on(tiny_model(family, torch.bfloat16), device)
    forward = SharedPrefixForward(model, PrefixCache(0))
    group = random_group(Shape(48, 4, 20), model.config.vocab_size, seed=3)
    suffixes = [Suffix(each.ids, list(each.measured)) for each in group.completions]
    prompt_group = PromptGroup(group.prompt_ids, suffixes)
    forward.batch([prompt_group])  # chooses kernels
    return lambda: forward.batch([prompt_group])


def num_waits(call: Callable[[], object], device: torch.device) -> int:
    """How often a call waits for a CUDA device, by PyTorch's own warnings. 0 on a CPU."""
    if device.type != "cuda":
        return 0
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return sum("synchroniz" in str(each.message) for each in caught)
