"""Models that compute with a cache in a wrong way, and the lengths of their passes."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shopr1_service.engine.lm_head import trunk_of


def patched(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, change: Any) -> PreTrainedModel:
    """The model, whose trunk's forward is replaced by `change(forward, kwargs)`."""
    trunk = trunk_of(model)
    original = trunk.forward
    monkeypatch.setattr(trunk, "forward", lambda **kwargs: change(original, kwargs))
    return model


def is_suffix(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("past_key_values") is not None


def ignore_the_cache(forward: Any, kwargs: dict[str, Any]) -> Any:
    return forward(**{**kwargs, "past_key_values": None})


def refuse_a_cache(forward: Any, kwargs: dict[str, Any]) -> Any:
    if is_suffix(kwargs):
        raise NotImplementedError("no cache")
    return forward(**kwargs)


def make_no_cache(forward: Any, kwargs: dict[str, Any]) -> Any:
    output = forward(**kwargs)
    output.past_key_values = None
    return output


def wrong_with_a_cache(is_wrong: Any) -> Any:
    def change(forward: Any, kwargs: dict[str, Any]) -> Any:
        output = forward(**kwargs)
        if is_suffix(kwargs) and is_wrong(kwargs["input_ids"].shape[1]):
            output.last_hidden_state = output.last_hidden_state * 1.01
        return output

    return change


def nan_with_a_cache(forward: Any, kwargs: dict[str, Any]) -> Any:
    output = forward(**kwargs)
    if is_suffix(kwargs):
        output.last_hidden_state = output.last_hidden_state * torch.nan
    return output


def lengths_of(model: PreTrainedModel) -> list[int]:
    """Tokens of each pass from now on."""
    seen: list[int] = []

    def note(_module: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append(kwargs["input_ids"].numel())

    trunk_of(model).register_forward_pre_hook(note, with_kwargs=True)
    return seen
