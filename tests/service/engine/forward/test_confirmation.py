"""Confirmation of an earlier check: a right strategy passes, a wrong one does not, with few passes."""

from typing import Any

import pytest
import torch

from shopr1_service.engine.forward.base import IndependentForward
from shopr1_service.engine.forward.confirmation import confirms, depends_on_weights
from shopr1_service.engine.forward.expanded import ExpandedForward
from shopr1_service.engine.forward.shared_prefix import SharedPrefixForward
from shopr1_service.engine.prefix_cache import PrefixCache
from tests.support.broken_models import (
    ignore_the_cache,
    lengths_of,
    nan_with_a_cache,
    patched,
    refuse_a_cache,
)
from tests.support.models import random_ids, tiny_model

CHECK_IDS = random_ids(32, seed=9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_strategy_that_is_right_is_confirmed(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    for forward in (SharedPrefixForward(model, PrefixCache(2**20)), ExpandedForward(model)):
        assert confirms(model, CHECK_IDS, forward)
    assert not confirms(model, CHECK_IDS[:6], IndependentForward(model))  # too few to show anything


@pytest.mark.parametrize("change", [ignore_the_cache, refuse_a_cache, nan_with_a_cache])
def test_a_strategy_that_is_wrong_is_not_confirmed(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    model = patched(monkeypatch, tiny_model("llama"), change)
    assert not confirms(model, CHECK_IDS, ExpandedForward(model))


def test_few_passes_confirm() -> None:
    model = tiny_model("mistral", sliding_window=200)
    lengths = lengths_of(model)
    assert confirms(model, random_ids(224, seed=1), ExpandedForward(model))
    assert len(lengths) <= 5  # two of them for each run of the strategy
    assert max(lengths) <= 64


def test_only_a_choice_of_keys_depends_on_weights() -> None:
    assert depends_on_weights(tiny_model("doge", keep_window_size=24, head_dim=8))
    assert not depends_on_weights(tiny_model("mistral"))
