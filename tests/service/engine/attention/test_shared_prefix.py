"""The choice of a kernel, and refused options. `forward/test_shared_prefix.py` tests the rest."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shopr1_service.engine.attention.matmul import MatmulAttention
from shopr1_service.engine.attention.shared_prefix import (
    SharedPrefixAttention,
    UnsupportedAttentionError,
    choose_kernel,
)
from shopr1_service.engine.prefix_cache import Segment
from tests.support.models import random_ids, tiny_model


@pytest.mark.parametrize("has_amx", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lengths", [[64], [100, 28], [100, 27], [1] * 9])
def test_long_segments_use_matrix_products_if_bfloat16_has_no_matrix_units(
    monkeypatch: pytest.MonkeyPatch, has_amx: bool, dtype: torch.dtype, lengths: list[int]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx})
    segments = [Segment(range(length), []) for length in lengths]
    is_matmul = isinstance(choose_kernel(segments, torch.device("cpu"), dtype), MatmulAttention)
    is_long = lengths in ([64], [100, 28])
    assert is_matmul == (not has_amx and dtype == torch.bfloat16 and is_long)


# --- options ----------------------------------------------------------------------------------------

TOKENS = random_ids(5)


class Layer(nn.Module):
    """A module of attention, as architectures hand it to the function."""

    def __init__(self, *, is_causal: bool | None = None) -> None:
        super().__init__()
        self.layer_idx = 0
        if is_causal is not None:
            self.is_causal = is_causal


def attend(layer: Layer | None = None, **options: Any) -> Tensor:
    attention = SharedPrefixAttention(tiny_model())
    states_1_A_T_D = torch.randn(1, 4, len(TOKENS), 8, generator=torch.Generator().manual_seed(0))
    with attention.active(attention.layout([Segment(TOKENS, [])], records=False)):
        out, _ = attention(layer or Layer(), states_1_A_T_D, states_1_A_T_D, states_1_A_T_D, None, **options)
    return out


@pytest.mark.parametrize(
    "option",
    [
        {"block_indices": torch.zeros(1)},
        {"indices": torch.zeros(1)},
        {"sinks": torch.zeros(1)},
        {"sliding_window": 0},
        {"position_bias": torch.zeros(1)},
        {"cu_seq_lens_q": torch.zeros(1)},
        {"some_later_option": False},
    ],
)
def test_options_that_are_not_known_are_refused(option: dict[str, Any]) -> None:
    [name] = option
    with pytest.raises(UnsupportedAttentionError, match=f"attention with {name}"):
        attend(**option)
    assert torch.equal(attend(**{name: None}), attend())


def test_harmless_options_change_nothing() -> None:
    harmless = {"position_ids": torch.arange(5)[None], "use_cache": False, "output_attentions": True}
    assert torch.equal(attend(Layer(is_causal=True), is_causal=True, **harmless), attend())
    assert torch.equal(attend(is_causal=None), attend())


@pytest.mark.parametrize(
    ("layer", "options"), [(Layer(is_causal=False), {}), (Layer(), {"is_causal": False})]
)
def test_attention_to_later_tokens_is_refused(layer: Layer, options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedAttentionError, match="not causal"):
        attend(layer, **options)
