"""The choice of how a linear head's logits are reduced on CUDA: verified at load, then timed.

    linear           several passes of PyTorch over each chunk of logits (`lm_head.py`)
    linear_written   matrix product of a chunk, then one kernel that reads it once
    linear_fused     one kernel for both: logits are never written

The reference is fp64, from the same weights and hidden states. Without CUDA or without `triton` the head
stays `linear`.

Dimensions: T tokens, H hidden size, C rows of a chunk.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shopr1_rewards.recipe import Divergence
from shopr1_rewards.self_certainty import Head, LogitSums, divergences
from shopr1_service.engine.lm_head import CHUNK_ROWS, LinearHead, trunk_of
from shopr1_service.engine.selection import device_time_s, fastest_right

logger = logging.getLogger(__name__)

TOLERANCE_NATS = 1e-4
"""Largest accepted error of a token."""
_TEMPERATURES = (1.0, 0.6)


Reduction = Callable[[LinearHead, Tensor, int, float, bool, bool], LogitSums]
"""Head, hidden states [T, H], rows, temperature, whether a and whether q are asked for (`LogitSums`)."""


@dataclass(frozen=True)
class ReducedHead(LinearHead):
    """A linear head with a faster reduction of its logits."""

    reduction_name: str = ""
    reduction: Reduction | None = None

    @property
    def name(self) -> str:
        return f"linear_{self.reduction_name}"

    def sums(
        self, hidden_T_H: Tensor, num_rows: int, temperature: float, *, weighs: bool, sums: bool
    ) -> LogitSums:
        assert self.reduction is not None
        return self.reduction(self, hidden_T_H, num_rows, temperature, weighs, sums)


@torch.inference_mode()
def with_fastest_reduction(head: LinearHead, model: PreTrainedModel, input_ids: Tensor) -> LinearHead:
    """The head with the fastest reduction that is right; on a CPU and in fp64 the head itself.

    Args:
        head: of the model.
        input_ids: whose hidden states are used, shape [1, T].
    """
    if not head.weight_V_H.is_cuda or head.weight_V_H.dtype == torch.float64:
        return head
    hidden_T_H = trunk_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state[0]
    rows_T_H = hidden_T_H.repeat(-(-head.max_tokens // len(hidden_T_H)), 1)[: head.max_tokens]

    def time_s_of(way: LinearHead) -> float:
        return device_time_s(lambda: divergences(rows_T_H, way, Divergence.KL_U_P))

    return fastest_head(head, reductions(), hidden_T_H, time_s_of)


def reductions() -> Mapping[str, Reduction]:
    """The reductions that can be tried here, by name."""
    try:
        from shopr1_service.engine.fused_head.reductions import (
            fused_products,
            written_products,
        )
    except ImportError as error:
        logger.warning("the head's logits are reduced by PyTorch: %s", error)
        return {}
    return {"written": written_products, "fused": fused_products}


def fastest_head(
    head: LinearHead,
    candidates: Mapping[str, Reduction],
    hidden_T_H: Tensor,
    time_s_of: Callable[[LinearHead], float],
) -> LinearHead:
    """The head with the fastest of these reductions that agrees with fp64, or with none of them."""
    heads = variants(head, candidates)
    expected = exact_values(head, hidden_T_H)

    def error_of(way: LinearHead) -> float:
        return error_nats(way, hidden_T_H, expected)

    return heads[fastest_right(heads, error_of, TOLERANCE_NATS, time_s_of) or head.name]


def variants(head: LinearHead, candidates: Mapping[str, Reduction]) -> dict[str, LinearHead]:
    """The head with none of these reductions, and with each, by name."""
    heads = [ReducedHead(**_own(head), reduction_name=name, reduction=it) for name, it in candidates.items()]
    return {each.name: each for each in (head, *heads)}


def exact_values(head: LinearHead, hidden_T_H: Tensor) -> list[Tensor]:
    """The values that `error_nats` expects, in fp64."""
    return list(_values(_ExactHead(**_own(head)), hidden_T_H.double()))


def error_nats(head: Head, hidden_T_H: Tensor, expected: Sequence[Tensor]) -> float:
    """The largest error of a token; infinite if other tokens are not finite."""
    pairs = zip(_values(head, hidden_T_H), expected, strict=True)
    return max(_error(actual_T, expected_T) for actual_T, expected_T in pairs)


def _own(head: LinearHead) -> dict[str, Any]:
    return {name: getattr(head, name) for name in ("weight_V_H", "bias_V", "scale", "softcap")}


def _values(head: Head, hidden_T_H: Tensor) -> Iterator[Tensor]:
    """Values in nats of every definition, of all rows and of fewer. A token whose state is NaN comes last."""
    nan_1_H = torch.full_like(hidden_T_H[:1], torch.nan)
    for divergence in (Divergence.KL_U_P, Divergence.KL_P_U):
        for temperature in _TEMPERATURES:
            for num_vocab in (head.num_rows, max(1, head.num_rows - 1)):
                yield divergences(
                    torch.cat([hidden_T_H, nan_1_H]),
                    head,
                    divergence,
                    temperature=temperature,
                    num_vocab=num_vocab,
                )


def _error(actual_T: Tensor, expected_T: Tensor) -> float:
    """The largest difference; infinite if other tokens are not finite."""
    is_finite_T = expected_T.isfinite()
    if not torch.equal(actual_T.isfinite(), is_finite_T):
        return torch.inf
    return float((actual_T - expected_T)[is_finite_T].abs().amax())


class _ExactHead(LinearHead):
    """The same logits in fp64."""

    def logit_chunks(self, hidden_T_H: Tensor, num_rows: int) -> Iterator[Tensor]:
        for first in range(0, num_rows, CHUNK_ROWS):
            rows = slice(first, min(first + CHUNK_ROWS, num_rows))
            bias_C = None if self.bias_V is None else self.bias_V[rows].double()
            chunk = replace(self, weight_V_H=self.weight_V_H[rows].double(), bias_V=bias_C)
            yield from LinearHead.logit_chunks(chunk, hidden_T_H, rows.stop - first)
