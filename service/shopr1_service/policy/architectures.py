"""The class of transformers that computes a checkpoint's logits, and architectures that cannot be scored.

A checkpoint of images and text is scored as a language model: prompts are text, and its other parts are
loaded but never called.
"""

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from shopr1_service.errors import PolicyError

_UNSCORABLE: Mapping[str, str] = {
    "blt": "it predicts bytes from patches, whose borders a second model chooses, and not tokens",
    "prophetnet": "it predicts several next tokens from streams of their own, and not from its hidden states",
    "xlnet": "it predicts tokens in any order: without a mask of its own, each token sees those after it",
}


def auto_class(config: PretrainedConfig) -> Any:  # noqa: ANN401  # transformers' factories have no common type
    """The factory for this config: of causal language models, else of multimodal ones.

    Raises:
        PolicyError: no class of this architecture predicts the next token.
    """
    kind = config.model_type
    if reason := _unscorable(config):
        raise PolicyError(f"architecture {kind!r} has no next-token logits to score: {reason}")
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    multimodal = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(kind)
    if causal is None and config.is_encoder_decoder:
        raise PolicyError(
            f"architecture {kind!r} is no causal language model: an encoder reads its input, and a decoder "
            "writes another text"
        )
    if causal is None and multimodal is None:
        raise PolicyError(f"architecture {kind!r} is not a causal language model that transformers knows")
    if multimodal is None or (causal is not None and not _is_of_class(config, causal, multimodal)):
        return AutoModelForCausalLM
    return AutoModelForMultimodalLM


def _unscorable(config: PretrainedConfig) -> str | None:
    if config.model_type == "xmod" and config.default_language is None:
        return "it needs the language of the text: set default_language in its config.json"
    return _UNSCORABLE.get(config.model_type)


def _is_of_class(config: PretrainedConfig, causal: str, multimodal: str) -> bool:
    """Whether the weights are the multimodal class's and the causal class does not read them, too."""
    ignored = getattr(transformers, causal)._keys_to_ignore_on_load_unexpected or ()
    reads_text_part = any("visual" in pattern for pattern in ignored)
    return multimodal in (config.architectures or ()) and not reads_text_part
