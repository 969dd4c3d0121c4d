"""The key by which duplicate requests are recognised."""

from typing import Any

import pytest

from shopr1_client.wire import ScoreRequest
from shopr1_service.http.scoring import _key
from tests.support.http import CLICK, TERMINATE, group


def key(settled_number: int = 3, run: str = "r", **changes: Any) -> bytes:
    body = {"groups": [group("a", "b", prompt="p")], **changes}
    return _key(ScoreRequest.model_validate(body), settled_number, run)


def test_equal_requests_have_equal_keys() -> None:
    assert key() == key() == key(recipe=None, policy_version=None)


@pytest.mark.parametrize(
    "changes",
    [
        {"settled_number": 4},
        {"run": ""},
        {"recipe": "shop_r1"},
        {"adapter": "base"},
        {"policy_version": "3"},
        {"groups": []},
        {"groups": [group("a", "b", prompt="q")]},
        {"groups": [group("b", "a", prompt="p")]},
        {"groups": [group("ab", prompt="p")]},
        {"groups": [group("a", "b", prompt="p", truth=CLICK)]},
        {"groups": [group("a", "b", prompt="p", id="1")]},
        {"groups": [group("a", prompt="p"), group("b", prompt="p")]},
        {"groups": [group("a", {"text": "b"}, prompt="p")]},
    ],
    ids=str,
)
def test_every_difference_gives_another_key(changes: dict[str, Any]) -> None:
    assert key(**changes) != key()


def test_half_surrogate_pairs_have_keys() -> None:
    pairs = [key(groups=[group(half, truth=TERMINATE)]) for half in ("\ud83d", "\ud83e", "\\ud83d")]
    assert len(set(pairs)) == 3
