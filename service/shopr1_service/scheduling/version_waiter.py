"""Requests that wait until a version of the policy is loaded."""

import asyncio
from collections.abc import Callable

from shopr1_client.errors import PolicyVersionError
from shopr1_service.core import Target
from shopr1_service.policy.versions import VersionTable


class VersionWaiter:
    """Wakes waiting requests when the loaded versions change. Used from the event loop only.

    Args:
        versions: returns the table of loaded versions.
    """

    def __init__(self, versions: Callable[[], VersionTable]) -> None:
        self._versions = versions
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """Wake all waiting requests: the loaded versions have changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for(self, target: Target) -> None:
        """Return as soon as a version is loaded that satisfies the target.

        Raises:
            InvalidRequestError: no such adapter is loaded.
            PolicyVersionError: no loaded version satisfies the target after `wait_s`, or none ever will.
        """
        wait_s = target.demand.wait_s if target.demand else 0.0
        deadline_s = asyncio.get_running_loop().time() + wait_s
        while (missing := self._missing(target)) is not None:
            if missing.retry_after_s is None or not await self._has_changed_by(deadline_s):
                raise missing

    def _missing(self, target: Target) -> PolicyVersionError | None:
        try:
            self._versions().find(target)
        except PolicyVersionError as error:
            return error
        return None

    async def _has_changed_by(self, deadline_s: float) -> bool:
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True
