"""Requests that wait for a version of the policy."""

import asyncio

from shopr1_client.errors import PolicyVersionError
from shopr1_service.concurrency import Pulse
from shopr1_service.core import Target
from shopr1_service.policy.base import PolicyView


class VersionWaiter:
    """Tells whoever waits that the policy has changed. Used from the event loop only."""

    def __init__(self, policy: PolicyView) -> None:
        self._policy = policy
        self._pulse = Pulse()

    def tell(self) -> None:
        """The policy has changed."""
        self._pulse.tell()

    async def wait_for(self, target: Target) -> None:
        """Return as soon as there is a version that a request wants.

        Raises:
            InvalidRequestError: no such adapter is loaded.
            PolicyVersionError: there is none, and `wait_s` have passed or it will not come any more.
        """
        wait_s = target.demand.wait_s if target.demand else 0.0
        due_s = asyncio.get_running_loop().time() + wait_s
        while (missing := self._missing(target)) is not None:
            if missing.retry_after_s is None or not await self._is_told_by(due_s):
                raise missing

    def _missing(self, target: Target) -> PolicyVersionError | None:
        try:
            self._policy.versions.find(target)
        except PolicyVersionError as error:
            return error
        return None

    async def _is_told_by(self, due_s: float) -> bool:
        try:
            async with asyncio.timeout_at(due_s):
                await self._pulse.wait()
        except TimeoutError:
            return False
        return True
