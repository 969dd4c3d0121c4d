"""What is read from model and tokenizer: lengths, ends, and tokens that all layers can be checked with."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_CHECK_TOKENS = 24
UNLIMITED = 10**9
"""More tokens than anything has. Transformers gives tokenizers without a limit 10³⁰."""
_CHECK_SEED = 0
# How far a layer sees, or how many tokens it takes at a time, in the words of all architectures.
_REACHES = ("sliding_window", "attention_chunk_size", "window_size", "chunk_size", "mamba_chunk_size")


def longest_sequence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = limit or tokenizer.model_max_length
    return int(limit) if limit < UNLIMITED else None


def check_ids(model: PreTrainedModel, num_ids: int, longest: int | None) -> list[int]:
    """Tokens for the checks: more than any layer sees at once, unless the policy takes no such sequence.

    So the last of them, which stand for completions, see only a part of those before, which are the prompt.
    """
    config = model.config.get_text_config()
    reach = max(getattr(config, name, None) or 0 for name in _REACHES)
    num_tokens = min(reach + NUM_CHECK_TOKENS, longest or UNLIMITED)
    generator = torch.Generator().manual_seed(_CHECK_SEED)
    ids: list[int] = torch.randint(num_ids, (num_tokens,), generator=generator).tolist()
    return ids


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What may follow an answer without belonging to it: end of turn, end of sequence, padding."""
    eos = model.generation_config.eos_token_id
    ids = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, tokenizer.pad_token_id]
    return sorted({token_id for token_id in ids if token_id is not None})
