"""Attention of one rectangle and its log-sum-exp, against softmax in fp64."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from shopr1_service.engine.attention.kernels import attend, banded

A, R, D = 3, 7, 8


def random(*sizes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*sizes, D, generator=torch.Generator().manual_seed(sum(sizes)), dtype=dtype)


def expected(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, softcap: float | None
) -> list[Tensor]:
    scores = query @ key.mT / D**0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(hidden, -torch.inf)
    return [torch.softmax(scores, -1) @ value, torch.logsumexp(scores, -1)]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("num_keys", "window"), [(7, 3), (19, 3), (19, 12), (33, 30)])
def test_windows(softcap: float | None, num_keys: int, window: int) -> None:
    query, key, value = random(2, A, R), random(2, A, num_keys), random(2, A, num_keys + 1)[:, :, 1:]
    queries, keys = torch.arange(num_keys - R, num_keys), torch.arange(num_keys)
    actual = attend(query, key, value, None, mask_R_W=banded(queries, keys, window, query), softcap=softcap)
    distance = queries[:, None] - keys
    hidden = (distance < 0) | (distance >= window)
    assert_close(list(actual), expected(query, key, value, hidden, softcap), rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_later_keys_are_not_seen(softcap: float | None) -> None:
    query, key, value = random(1, A, R), random(1, A, R), random(1, A, R)
    actual = attend(query, key, value, None, is_causal=True, softcap=softcap)
    hidden = torch.ones(R, R, dtype=torch.bool).triu(1)
    assert_close(list(actual), expected(query, key, value, hidden, softcap), rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_query_that_sees_no_key_has_no_weight(dtype: torch.dtype, softcap: float | None) -> None:
    query, key, value = (random(1, A, R, dtype=dtype) for _ in range(3))
    mask = banded(torch.arange(4, 4 + R), torch.arange(R), 4, query)
    out, lse = attend(query, key, value, None, mask_R_W=mask, softcap=softcap)
    assert out.isfinite().all()
    weight = torch.sigmoid(lse - 0.0)  # beside another part whose log-sum-exp is 0
    assert (weight[:, :, 6:] == 0).all()  # these see keys from 7 on
    assert (weight[:, :, :6] > 0).all()


def test_rows_of_masks_are_aligned() -> None:
    mask_R_W = banded(torch.arange(5), torch.arange(21), 3, random(1))
    assert mask_R_W.shape == (5, 21)
    assert mask_R_W.stride() == (32, 1)
