"""The choice between fused attention and matrix products. `forward/test_shared_prefix.py` tests the rest."""

import pytest
import torch

from shopr1_service.engine.attention.matmul import MatmulAttention
from shopr1_service.engine.attention.shared_prefix import choose_kernel
from shopr1_service.engine.prefix_cache import Segment


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
