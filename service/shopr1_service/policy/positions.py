"""The longest sequence that a policy can place: its config's limit, and that of its position table.

Models with rotary embeddings compute past their limit; models with a table of positions fail.
"""

import logging

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shopr1_service.engine.lm_head import trunk_of
from shopr1_service.errors import PolicyError

logger = logging.getLogger(__name__)

UNLIMITED = 10**9
"""More tokens than any sequence has. Transformers gives tokenizers without a limit 10³⁰."""
_LONGEST_TABLE = 16_384
"""Tokens; no table of positions is longer."""


def longest_sequence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The model's limit in tokens, else the tokenizer's; None if neither states one."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not limit or limit < 0:  # XLNet states -1
        limit = tokenizer.model_max_length
    if limit >= UNLIMITED:
        return None
    return int(limit) - _num_unused_positions(model)


def check_positions(model: PreTrainedModel, num_tokens: int, longest: int | None) -> None:
    """Try a sequence that is longer than the policy states, if sequences may be.

    Args:
        num_tokens: the longest sequence that will be scored.
        longest: that the policy states.

    Raises:
        PolicyError: the model cannot compute with it.
    """
    if longest is None or num_tokens <= longest or longest > _LONGEST_TABLE:
        return
    ids = torch.zeros((1, longest + 1), dtype=torch.long, device=model.device)
    try:
        with torch.inference_mode():
            trunk_of(model)(input_ids=ids, use_cache=False)
    except Exception as error:  # an index, a shape, or the device's own error
        raise PolicyError(
            f"max_sequence_tokens is {num_tokens}, but {type(model).__name__} has only {longest} positions: "
            f"with one more token it fails ({type(error).__name__})"
        ) from error
    logger.warning(
        "max_sequence_tokens is %d, above the %d tokens that the policy was made for", num_tokens, longest
    )


def _num_unused_positions(model: PreTrainedModel) -> int:
    """Rows of the position table before the first token's: RoBERTa counts from behind the padding's."""
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and name.rpartition(".")[2] == "position_embeddings"
        if is_table and module.padding_idx is not None:
            return int(module.padding_idx) + 1
    return 0
