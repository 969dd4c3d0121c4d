"""What is sent of a model that PEFT has put adapters on: one of them, without the weights below."""

import importlib
import json
from typing import Any

from shopr1_client.updates.weights import Module, Weights, of_tensors, unwrapped
from shopr1_client.wire_policy import ADAPTER_CONFIG_KEY


def is_adapted(module: Module) -> bool:
    """Whether PEFT has put adapters on a module."""
    return bool(getattr(unwrapped(module), "peft_config", None))


def active_adapter(module: Module) -> str:
    """The name of the adapter that the model computes with.

    Raises:
        ValueError: it is not one.
    """
    inner = unwrapped(module)
    active = getattr(inner, "active_adapter", None) or inner.active_adapters
    names = active() if callable(active) else active
    if isinstance(names, str):
        return names
    if len(names) != 1:
        raise ValueError(f"one adapter can be sent, and {len(names)} are active: {', '.join(names)}")
    return str(names[0])


def of_adapter(module: Module) -> Weights:
    """The active adapter under PEFT's names, with its configuration in the metadata.

    Raises:
        ValueError: it is not one, or cannot be sent; it says what to do.
    """
    inner, name = unwrapped(module), active_adapter(module)
    peft = importlib.import_module("peft")  # whoever has such a model has it
    # Without embeddings: PEFT would look for the base model's on its hub.
    tensors = peft.get_peft_model_state_dict(inner, adapter_name=name, save_embedding_layers=False)
    config = json.dumps(inner.peft_config[name].to_dict(), default=_jsonable)
    return of_tensors(tensors, {ADAPTER_CONFIG_KEY: config})


def _jsonable(value: Any) -> Any:  # noqa: ANN401
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
