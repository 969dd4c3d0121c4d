"""Updates through both clients, and weights to send."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from shopr1_client import AsyncClient, Client
from shopr1_client.updates.plan import Answer
from tests.support.http import WAIT_S

Update = Callable[..., Answer]


def with_client(
    urls: str | Sequence[str], *given: Any, retry_for_s: float = WAIT_S, **options: Any
) -> Answer:
    with Client(urls, retry_for_s=retry_for_s) as client:
        return client.update_policy(*given, **options)


def with_async_client(
    urls: str | Sequence[str], *given: Any, retry_for_s: float = WAIT_S, **options: Any
) -> Answer:
    return asyncio.run(AsyncClient(urls, retry_for_s=retry_for_s).update_policy(*given, **options))


both = pytest.mark.parametrize("update", [with_client, with_async_client], ids=["sync", "async"])


def layer(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(5, 3)


def assert_sent(body: bytes, module: nn.Module) -> None:
    sent, expected = safetensors.torch.load(body), module.state_dict()
    assert sent.keys() == expected.keys()
    assert all(torch.equal(sent[name], tensor) for name, tensor in expected.items())
