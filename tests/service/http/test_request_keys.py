"""The keys of a request: which requests share a computation, and which are tries of one."""

from typing import Any

import pytest
from asgi_correlation_id import correlation_id
from fastapi import Request

from shopr1_client.errors import InvalidRequestError
from shopr1_client.wire import ScoreRequest
from shopr1_service.http.request_keys import content_key, own_key
from tests.support.http import CLICK, TERMINATE, group


def key(run: str = "r", **changes: Any) -> bytes:
    body = {"groups": [group("a", "b", prompt="p")], **changes}
    return content_key(ScoreRequest.model_validate(body), run)


def test_equal_requests_have_equal_keys() -> None:
    assert key() == key() == key(recipe=None, policy_version=None)


@pytest.mark.parametrize(
    "changes",
    [
        {"run": ""},
        {"recipe": "shop_r1"},
        {"adapter": "base"},
        {"policy_version": "3"},
        {"groups": []},
        {"groups": [group("a", "b", prompt="q")]},
        {"groups": [group("a", "b", prompt="")]},
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


# --- of a request itself ----------------------------------------------------------------------------


def own(content: bytes = b"content", *, accepted_id: str = "made-here", **headers: str) -> bytes | None:
    """The key of a request with these headers; an id that the middleware accepts is the request's."""
    correlation_id.set(accepted_id)
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return own_key(Request({"type": "http", "headers": raw}), content)


def test_a_request_without_id_and_key_has_none() -> None:
    assert own() is None
    assert own(x_request_id="a malformed one, which was replaced") is None


def test_tries_have_equal_keys_and_other_requests_others() -> None:
    keys = [
        own(idempotency_key="k"),
        own(idempotency_key="l"),
        own(b"other", idempotency_key="k"),
        own(x_request_id="k", accepted_id="k"),
        own(x_request_id="l", accepted_id="l"),
        own(b"other", x_request_id="k", accepted_id="k"),
    ]
    assert len(set(keys)) == len(keys)
    assert None not in keys
    # Proxies give each try an id of its own: the client's key counts.
    assert own(idempotency_key="k", x_request_id="i", accepted_id="i") == keys[0]
    assert own(x_request_id="k", accepted_id="k") == keys[3]


@pytest.mark.parametrize("key", ["", " ", "a b", "é", "k" * 256, "a\x00b"])
def test_a_malformed_key_is_refused(key: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        own(idempotency_key=key)
    [error] = caught.value.errors
    assert error["location"] == "header.Idempotency-Key"
