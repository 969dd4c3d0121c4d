"""How a policy is split: transformers' own plan of its architecture, but for embeddings and head.

These stay whole on every device, as the head multiplies with rows of its weight. On N devices it costs each
of them (N−1)/N of what they take: 2 · V · H numbers, or half of that where they are tied.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

from shopr1_service.device import choose_device
from shopr1_service.errors import PolicyError
from shopr1_service.settings import Settings
from shopr1_service.source import Source

_WHOLE = "replicate"
_DEALT = {"num_attention_heads": "attention heads", "num_key_value_heads": "key-value heads"}


def plan_overrides(source: Source, settings: Settings) -> dict[str, str]:
    """What is to be changed of the plan, before anything large is read.

    Raises:
        PolicyError: it cannot be split over so many devices, or these are not there.
    """
    if _WHOLE not in ALL_PARALLEL_STYLES:
        raise PolicyError("tensor_parallel needs transformers 5.23 or newer")
    _check_devices(settings)
    options: dict[str, Any] = {"trust_remote_code": False}
    if settings.revision is not None:
        options["revision"] = settings.revision
    if source.gguf_file is not None:
        options["gguf_file"] = source.gguf_file
    config = AutoConfig.from_pretrained(source.path, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    _check_heads(config.get_text_config(), settings.tensor_parallel)
    return _overrides(model)


def _check_devices(settings: Settings) -> None:
    device, wanted = choose_device(settings.device), settings.tensor_parallel
    if ":" in settings.device:
        raise PolicyError(
            f"device {settings.device!r} is one; tensor_parallel = {wanted} takes the first ones"
        )
    if device.type == "cuda" and (num := torch.cuda.device_count()) < wanted:
        raise PolicyError(f"tensor_parallel = {wanted}, but there are {num} CUDA devices")
    if device.type == "cpu" and torch.accelerator.is_available():
        # Transformers takes the accelerator, whatever it is told.
        raise PolicyError("device 'cpu' cannot be split where there is an accelerator: hide it, or use it")


def _check_heads(config: Any, num_ranks: int) -> None:  # noqa: ANN401  # every architecture has its own
    for name, words in _DEALT.items():
        num_heads = getattr(config, name, None)
        if isinstance(num_heads, int) and num_heads % num_ranks:
            raise PolicyError(
                f"tensor_parallel = {num_ranks} does not divide the policy's {num_heads} {words}"
            )


def _overrides(model: PreTrainedModel) -> dict[str, str]:
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    ends = (model.get_input_embeddings(), head)
    whole = {name for name, module in model.named_modules() if module in ends}
    plan = model.tp_plan or {}
    if not plan.keys() - whole:
        raise PolicyError(
            f"transformers has no tensor parallel plan of {type(model).__name__}: set tensor_parallel = 1"
        )
    return dict.fromkeys(sorted(whole & plan.keys()), _WHOLE)
