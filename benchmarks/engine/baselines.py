"""The common baseline: a batch of whole sequences whose logits are reduced in fp32."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.workloads import Shape
from shopr1_service.core import TokenGroup


@torch.inference_mode()
def batch_certainties(model: PreTrainedModel, group: TokenGroup, *, keeps_all: bool) -> list[Tensor]:
    """KL(U‖p) in nats at each measured token of each completion. All completions have the same length.

    Args:
        keeps_all: compute the prompt's logits too, as Intuitor does, instead of setting `logits_to_keep`.
    """
    rows = [[*group.prompt_ids, *completion.ids] for completion in group.completions]
    num_own = len(group.completions[0].ids)
    num_kept = 0 if keeps_all else num_own + 1  # 0 keeps all
    ids = torch.tensor(rows, device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=num_kept).logits
    # The last token's logits predict the token after the completion.
    values = [_self_certainty(logits_T_V.float()) for logits_T_V in logits[:, -num_own - 1 : -1]]
    return [
        values_T[list(completion.measured)]
        for values_T, completion in zip(values, group.completions, strict=True)
    ]


def _self_certainty(logits_T_V: Tensor) -> Tensor:
    return logits_T_V.logsumexp(-1) - logits_T_V.mean(-1) - math.log(logits_T_V.shape[-1])


def all_logits_bytes(model: PreTrainedModel, shape: Shape) -> int:
    """Size of the logits of a whole batch."""
    num_logits = shape.num_batch_tokens * model.config.get_text_config().vocab_size
    return int(num_logits * model.dtype.itemsize)
