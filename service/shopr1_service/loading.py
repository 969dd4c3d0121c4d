"""Loading a policy with transformers: from a directory, a hub id, or a GGUF file.

Weights are read from safetensors or GGUF only and no code that comes with a model is run: pickled weights
and remote code execute whatever their author put in them.
"""

import logging
import os
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shopr1_service.building import build_policy
from shopr1_service.device import choose_device, choose_dtype
from shopr1_service.errors import PolicyError
from shopr1_service.loaded_policy import LoadedPolicy
from shopr1_service.settings import Settings
from shopr1_service.source import Source, find_source
from shopr1_service.startup import Startup, Step

logger = logging.getLogger(__name__)


def load_policy(settings: Settings, startup: Startup | None = None) -> LoadedPolicy:
    """Load, check and warm up the policy that the settings name.

    Args:
        startup: is told how far it is.

    Raises:
        PolicyError: not found, not loadable, or not a model whose certainty can be measured.
    """
    startup = startup or Startup()
    source = find_source(settings.policy)
    try:
        startup.enter(Step.READING_WEIGHTS)
        tokenizer, model = load_model(source, settings)
        return build_policy(model, tokenizer, settings, name=source.name, startup=startup)
    except PolicyError:
        raise
    except Exception as error:  # a damaged checkpoint raises whatever its reader stumbles over
        reason = f"{type(error).__name__}: {error}"
        raise PolicyError(f"cannot load policy {source.name!r}: {reason}") from error


def load_model(source: Source, settings: Settings) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model, on the device and in the dtype of the settings."""
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    if settings.deterministic and device.type == "cuda":
        # cuBLAS sums in an order of its own choice unless it is given fixed work space.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    logger.info("loading %s on %s in %s", source.name, device, dtype)
    return _load(source, device, dtype, settings.revision)


def _load(
    source: Source, device: torch.device, dtype: torch.dtype, revision: str | None
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    options: dict[str, Any] = {"trust_remote_code": False}
    if revision is not None:
        options["revision"] = revision
    if source.gguf_file is not None:
        options["gguf_file"] = source.gguf_file
    tokenizer = AutoTokenizer.from_pretrained(source.path, **options)
    if source.gguf_file is not None:
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source.path, dtype=dtype, output_loading_info=True, **options
    )
    model: PreTrainedModel = loaded[0]
    loading: dict[str, Any] = loaded[1]
    if loading["missing_keys"]:  # transformers makes up random numbers for them
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise PolicyError(f"cannot load policy {source.name!r}: it has no weights for {missing} …")
    torch.nn.Module.to(model, device)
    return tokenizer, model
