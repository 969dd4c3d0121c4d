"""Sends an update of the policy to every server, with retries.

Before each attempt the server's loaded versions are read: if the response was lost, the update may already be
loaded.
"""

import time
from collections.abc import Callable, Sequence

import httpx

from shopr1_client import transport as exchange
from shopr1_client.base import Retries
from shopr1_client.errors import MixedVersionsError, ShopR1Error
from shopr1_client.updates.plan import Answer, Change, newest_number
from shopr1_client.wire_policy import PolicyState


class Updater:
    """Updates servers, one after the other.

    Args:
        retries: attempts for one server.
    """

    def __init__(self, http: httpx.Client, urls: Sequence[str], retries: Callable[[], Retries]) -> None:
        self._http = http
        self._urls = urls
        self._retries = retries

    def run(self, change: Change) -> Answer:
        """Update all servers; returns the response of the last one.

        Raises:
            MixedVersionsError: only some servers were updated, or verified.
            VerificationError: the first server gives other numbers than the model.
            ShopR1Error: none was updated.
        """
        answer: Answer | None = None
        for i, url in enumerate(self._urls):
            try:
                answer = self._update(change, url)
                self._verify(change, url, answer)
            except ShopR1Error as error:
                if i == 0:
                    raise
                raise MixedVersionsError(change.version, self._urls[:i], url, self._urls[i + 1 :]) from error
        assert answer is not None  # a client has a server
        return answer

    def _update(self, change: Change, url: str) -> Answer:
        first: PolicyState | None = None
        begin = time.monotonic()
        for attempt in self._retries():
            with attempt:
                state = self._state(url)
                first = first or state
                if found := change.find_in(state, since=newest_number(first)):
                    return change.to_answer(found, first.base, time.monotonic() - begin)
                return self._send(change, url)
        raise AssertionError("the last attempt raises")

    def _verify(self, change: Change, url: str, answer: Answer) -> None:
        if change.probe is None:
            return
        for attempt in self._retries():
            with attempt:
                change.probe.check(self._http, url, answer.current)

    def _state(self, url: str) -> PolicyState:
        try:
            response = self._http.get(f"{url}/policy")
        except httpx.RequestError as error:
            raise exchange.failure(f"GET {url}/policy", error) from error
        return exchange.parse(PolicyState, response)

    def _send(self, change: Change, url: str) -> Answer:
        try:
            response = change.send(self._http, url)
        except httpx.RequestError as error:
            raise exchange.failure(f"version {change.version} for {url}", error) from error
        return exchange.parse(change.answer, response)
