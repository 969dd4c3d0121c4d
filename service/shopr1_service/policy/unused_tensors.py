"""Tensors of a checkpoint that the policy would not compute with.

Transformers only warns of them, yet they change the numbers: biases that the config denies, more layers than
it has, an `lm_head` of its own where the config ties it to the embedding. They are refused unless the setting
`ignored_tensors` names them.
"""

import logging
import re
from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel

from shopr1_service.errors import PolicyError
from shopr1_service.weights.tensors import is_ignored

logger = logging.getLogger(__name__)

_MAX_SHOWN = 8
_BUFFERS = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|position_ids|masked_bias)$"  # rotary embeddings, positions, −∞
    r"|\.attn_rot_embd\.weight$"  # rotary embeddings of old GGUF files
    r"|\.(attn|attention)\.bias$"  # causal masks of GPT-2 and its kin
)
"""Constants that former versions of transformers saved; models compute them from their config."""


def refuse_unused(names: Iterable[str], ignored: Sequence[str]) -> None:
    """Refuse tensors that were not loaded.

    Args:
        ignored: patterns of the setting `ignored_tensors`.

    Raises:
        PolicyError: names them.
    """
    unused = sorted(name for name in names if not _BUFFERS.search(name))
    refused = [name for name in unused if not is_ignored(name, ignored)]
    if refused:
        shown = ", ".join(refused[:_MAX_SHOWN]) + (" …" if len(refused) > _MAX_SHOWN else "")
        raise PolicyError(
            f"the policy would not compute with {len(refused)} tensors of the checkpoint: {shown}. Its "
            "config may be of another model (fewer layers, no biases); if they are not meant to be used, "
            "name them in `ignored_tensors`"
        )
    if unused:
        logger.warning("ignored tensors of the checkpoint: %s", ", ".join(unused))


def resolve_ties(model: PreTrainedModel, ignored: Sequence[str]) -> None:
    """Refuse tensors that the config ties to others and the checkpoint has with other numbers.

    Transformers unties them. Ignored ones are tied again.

    Raises:
        PolicyError: names them.
    """
    wanted = model.get_expanded_tied_weights_keys(all_submodels=True)
    untied = {name: owner for name, owner in wanted.items() if name not in model.all_tied_weights_keys}
    for name, owner in untied.items():
        if not is_ignored(name, ignored):
            raise PolicyError(
                f"the config ties {name} to {owner} (tie_word_embeddings), but the checkpoint has both, with "
                "different numbers: set tie_word_embeddings to false in its config.json to use both, or name "
                f"{name} in `ignored_tensors` to leave it out"
            )
        logger.warning("ignored %s of the checkpoint: the config ties it to %s", name, owner)
    if untied:
        model.tie_weights()
