"""The policy's head: logits from hidden states, without a [T, V] tensor.

`LinearHead` multiplies by a chunk of the weight's rows at a time and applies the model's scale and softcap.
Architectures differ here, so its logits are compared with the model's own at load. If they differ,
`ModuleHead` runs the model's own head on a few tokens at a time.

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
            logits_T_C = _matmul_exact(hidden_T_H, self.weight_V_H[rows])
            if self.bias_V is not None:
                logits_T_C = logits_T_C + self.bias_V[rows].to(logits_T_C.dtype)
            if self.scale != 1.0:
                logits_T_C = logits_T_C * self.scale
            if self.softcap is not None:
                logits_T_C = self.softcap * torch.tanh(logits_T_C / self.softcap)
            yield logits_T_C


def _matmul_exact(hidden_T_H: Tensor, weight_C_H: Tensor) -> Tensor:
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
    """

    max_tokens = MODULE_MAX_TOKENS

    def __init__(self, model: PreTrainedModel, num_rows: int) -> None:
        self._model = model
        self.num_rows = num_rows

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
def choose_head(model: PreTrainedModel, input_ids: Tensor) -> Head:
    """The fastest head whose logits equal `model(...).logits` on these ids, shape [1, T].

    Raises:
        UnsupportedModelError: no head gives these logits.
    """
    expected_T_V = model(input_ids=input_ids, use_cache=False).logits[0]
    hidden_T_H = trunk_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state[0]
    heads: list[Head] = [ModuleHead(model, expected_T_V.shape[1])]
    if (linear := _linear_head(model)) is not None:
        heads.insert(0, linear)
    for head in heads:
        if _agrees(head, hidden_T_H, expected_T_V):
            return head
        logger.warning("%s does not give the logits of %s", type(head).__name__, type(model).__name__)
    raise UnsupportedModelError(f"the logits of {type(model).__name__} cannot be made from its hidden states")


def _agrees(head: Head, hidden_T_H: Tensor, expected_T_V: Tensor) -> bool:
    if head.num_rows != expected_T_V.shape[1]:
        return False
    blocks = torch.split(hidden_T_H, head.max_tokens)
    logits_T_V = torch.cat([torch.cat(list(head.logit_chunks(b, head.num_rows)), dim=1) for b in blocks])
    # A model may mask rows with −∞; these must be at the same places. All other logits must be finite.
    finite_T_V = expected_T_V.isfinite()
    is_sound = bool((finite_T_V | (expected_T_V == -math.inf)).all()) and bool(finite_T_V.any())
    if not is_sound or not torch.equal(logits_T_V.isfinite(), finite_T_V):
        return False
    logits, expected = logits_T_V[finite_T_V], expected_T_V[finite_T_V]
    tolerance = _TOLERANCE[expected.dtype] * max(1.0, float(expected.abs().max()))
    mean_T = head.mean_logits(hidden_T_H, head.num_rows)
    if mean_T is not None and (mean_T - expected_T_V.double().mean(dim=1)).abs().max() > tolerance:
        return False
    return bool((logits - expected).abs().max() <= tolerance)


def _linear_head(model: PreTrainedModel) -> LinearHead | None:
    module = _output_embeddings(model)
    if type(module) is not nn.Linear:  # a quantised or adapted layer is more than its weight
        return None
    config = model.config.get_text_config()
    return LinearHead(
        weight_V_H=module.weight,
        bias_V=module.bias,
        scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _logit_scale(config: Any) -> float:  # noqa: ANN401  # every architecture has its own
    scale = getattr(config, "logit_scale", None) or 1.0  # cohere
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # falcon_h1
    return float(scale) / (getattr(config, "logits_scaling", None) or 1.0)  # granite


def _output_embeddings(model: PreTrainedModel) -> nn.Module:
    module: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return module
