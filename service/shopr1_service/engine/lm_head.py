"""The policy's head: logits from hidden states, without a [T, V] tensor.

`LinearHead` multiplies by a chunk of the weight's rows at a time and applies the model's scale and softcap.
Architectures differ here, so its logits are compared with the model's own at load. If they differ, or cannot
be computed, `ModuleHead` runs the model's own head on a few tokens at a time.

Dimensions: T tokens, H hidden size, V vocabulary rows, C rows of a chunk.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shopr1_rewards.self_certainty import Head

logger = logging.getLogger(__name__)

CHUNK_ROWS = 4096
"""Vocabulary rows of a chunk. 2-4 k columns of logits stay in a CPU's cache while they are reduced."""
CUDA_CHUNK_ROWS = 16_384
"""On CUDA, fewer launches matter more: a chunk is 64 MiB of logits."""
_SUMMED_ROWS = 1024
"""Rows summed at a time: in fp64 they fit in a core's cache."""
LINEAR_MAX_TOKENS = 1024
"""Tokens that a linear head takes at a time."""
MODULE_MAX_TOKENS = 16
"""Tokens that the model's own head takes at a time: it computes all V logits of each."""

# Largest accepted difference of logits, relative to the largest logit: the dtype's rounding times a few
# operations. A missing scale, softcap or bias makes a far larger difference.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


class UnsupportedModelError(RuntimeError):
    """The engine cannot compute this model's logits from its hidden states."""


@dataclass(frozen=True)
class LinearHead:
    """logits = softcap(scale · (h·Wᵀ + b)), in fp32 or fp64, a chunk of rows of W at a time.

    Attributes:
        weight_V_H: the output embedding, possibly tied to the input embedding.
        scale: factor of the logits (granite's config states its inverse).
        softcap: c in c · tanh(z / c) (gemma); None for none.
    """

    weight_V_H: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    max_tokens: int = LINEAR_MAX_TOKENS
    _means: dict[int, tuple[Tensor, float]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The name shown by `/info`."""
        return "linear"

    @property
    def num_rows(self) -> int:
        return self.weight_V_H.shape[0]

    def mean_logits(self, hidden_T_H: Tensor, num_rows: int) -> Tensor | None:
        if self.softcap is not None:  # tanh is not linear
            return None
        if num_rows not in self._means:
            self._means[num_rows] = self._mean_row(num_rows)
        row_H, bias = self._means[num_rows]
        return self.scale * (hidden_T_H.double() @ row_H + bias)

    def renew(self) -> None:
        """Drop what was computed from the weight, after it has changed."""
        self._means.clear()

    def _mean_row(self, num_rows: int) -> tuple[Tensor, float]:
        """The mean of the weight's rows and of the bias, in fp64."""
        parts = torch.split(self.weight_V_H[:num_rows], _SUMMED_ROWS)
        sum_H = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0)
        bias = 0.0 if self.bias_V is None else float(self.bias_V[:num_rows].double().mean())
        return sum_H / num_rows, bias

    def logit_chunks(self, hidden_T_H: Tensor, num_rows: int) -> Iterator[Tensor]:
        step = CUDA_CHUNK_ROWS if self.weight_V_H.is_cuda else CHUNK_ROWS
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            logits_T_C = matmul_exact(hidden_T_H, self.weight_V_H[rows])
            if self.bias_V is not None:
                logits_T_C = logits_T_C + self.bias_V[rows].to(logits_T_C.dtype)
            if self.scale != 1.0:
                logits_T_C = logits_T_C * self.scale
            if self.softcap is not None:
                logits_T_C = self.softcap * torch.tanh(logits_T_C / self.softcap)
            yield logits_T_C


def matmul_exact(hidden_T_H: Tensor, weight_C_H: Tensor) -> Tensor:
    """h·Wᵀ, accumulated and returned in fp32 or wider: 16-bit logits are off by up to 0.1 nat each."""
    if weight_C_H.dtype in (torch.float32, torch.float64):
        return hidden_T_H @ weight_C_H.T
    if weight_C_H.is_cuda:
        return torch.mm(hidden_T_H, weight_C_H.T, out_dtype=torch.float32)
    return hidden_T_H.float() @ weight_C_H.float().T


class ModuleHead:
    """The model's own head, on a few tokens at a time.

    The model runs on dummy tokens while a hook replaces the output of its trunk by the given hidden states.
    Everything after the trunk is the model's own code.

    Args:
        reason: why no faster head was taken.
    """

    name = "module"
    max_tokens = MODULE_MAX_TOKENS

    def __init__(self, model: PreTrainedModel, num_rows: int, reason: str = "") -> None:
        self._model = model
        self.num_rows = num_rows
        self.reason = reason

    def mean_logits(self, hidden_T_H: Tensor, num_rows: int) -> Tensor | None:
        return None  # the model's head may not be linear

    def logit_chunks(self, hidden_T_H: Tensor, num_rows: int) -> Iterator[Tensor]:
        def replace_hidden(_module: nn.Module, _args: Any, output: Any) -> Any:  # noqa: ANN401
            output.last_hidden_state = hidden_T_H[None]
            return output

        handle = trunk_of(self._model).register_forward_hook(replace_hidden)
        try:
            dummy = torch.zeros((1, hidden_T_H.shape[0]), dtype=torch.long, device=hidden_T_H.device)
            logits_T_V = self._model(input_ids=dummy, use_cache=False).logits[0]
        finally:
            handle.remove()
        at_least_fp32 = torch.promote_types(logits_T_V.dtype, torch.float32)
        yield logits_T_V[:, :num_rows].to(at_least_fp32)


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head: the module that computes the hidden states.

    Raises:
        UnsupportedModelError: the model has no such module.
    """
    trunk = model.base_model
    if trunk is model:  # Llama 4 and Mllama name a part that their other class has
        trunk = getattr(getattr(model, "language_model", model), "model", model)
    if trunk is model:
        raise UnsupportedModelError(f"{type(model).__name__} has no trunk apart from its head")
    return trunk


@torch.inference_mode()
def choose_head(model: PreTrainedModel, input_ids: Tensor) -> "LinearHead | ModuleHead":
    """The fastest head whose logits equal `model(...).logits` on these ids, shape [1, T].

    Raises:
        UnsupportedModelError: no head gives these logits.
    """
    try:
        expected_T_V = model(input_ids=input_ids, use_cache=False).logits[0]
    except (TypeError, ValueError) as cause:  # it asks for images, or for a part that is not tokens
        raise UnsupportedModelError(
            f"{type(model).__name__} does not compute logits from token ids alone: {cause}"
        ) from cause
    hidden_T_H = trunk_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state[0]
    tolerance = _TOLERANCE[expected_T_V.dtype]
    reason = "its output embedding is no plain linear layer"
    errors = [(_error(head, hidden_T_H, expected_T_V), head) for head in _linear_heads(model)]
    if errors:
        error, linear = min(errors, key=lambda pair: pair[0].relative)
        if error.relative <= tolerance:
            return linear
        reason = error.cause
    logger.warning("%s needs its own head, which is slower: %s", type(model).__name__, reason)
    head = ModuleHead(model, expected_T_V.shape[1], reason)
    if (error := _error(head, hidden_T_H, expected_T_V)).relative <= tolerance:
        return head
    raise UnsupportedModelError(
        f"the logits of {type(model).__name__} cannot be made from its hidden states: {error.cause}"
    )


@dataclass(frozen=True)
class _Error:
    """Largest difference of logits, relative to the largest logit; infinite if they cannot be compared."""

    relative: float
    cause: str


def _error(head: Head, hidden_T_H: Tensor, expected_T_V: Tensor) -> _Error:
    try:
        relative = _relative_error(head, hidden_T_H, expected_T_V)
    except Exception as error:  # weights of another shape, or whatever an architecture raises
        return _Error(math.inf, f"{type(head).__name__} fails: {error!r}")
    return _Error(relative, f"{type(head).__name__} gives other logits, by {relative:.2g} of the largest")


def _relative_error(head: Head, hidden_T_H: Tensor, expected_T_V: Tensor) -> float:
    if head.num_rows != expected_T_V.shape[1]:
        return math.inf
    blocks = torch.split(hidden_T_H, head.max_tokens)
    logits_T_V = torch.cat([torch.cat(list(head.logit_chunks(b, head.num_rows)), dim=1) for b in blocks])
    # A model may mask rows with −∞; these must be at the same places. All other logits must be finite.
    finite_T_V = expected_T_V.isfinite()
    is_sound = bool((finite_T_V | (expected_T_V == -math.inf)).all()) and bool(finite_T_V.any())
    if not is_sound or not torch.equal(logits_T_V.isfinite(), finite_T_V):
        return math.inf
    logits, expected = logits_T_V[finite_T_V], expected_T_V[finite_T_V]
    error = float((logits - expected).abs().max())
    mean_T = head.mean_logits(hidden_T_H, head.num_rows)
    if mean_T is not None:
        error = max(error, float((mean_T - expected_T_V.double().mean(dim=1)).abs().max()))
    return error / max(1.0, float(expected.abs().max()))


def _linear_heads(model: PreTrainedModel) -> list[LinearHead]:
    """A linear head for each factor of the logits that the config may mean, the likeliest first."""
    module = _output_embeddings(model)
    if type(module) is not nn.Linear:  # a quantised or adapted layer is more than its weight
        return []
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    return [LinearHead(module.weight, module.bias, scale, softcap) for scale in _logit_scales(config)]


def _logit_scales(config: Any) -> list[float]:  # noqa: ANN401  # every architecture has its own
    factor = getattr(config, "logit_scale", None) or 1.0  # cohere
    factor *= getattr(config, "lm_head_multiplier", None) or 1.0  # falcon_h1
    scaling = getattr(config, "logits_scaling", None) or 1.0
    # granite divides by it, hyperclovax multiplies.
    return list(dict.fromkeys(float(scale) for scale in (factor / scaling, factor * scaling)))


def _output_embeddings(model: PreTrainedModel) -> nn.Module:
    module: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return module
