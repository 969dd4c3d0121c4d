"""Something has changed: told to everybody who waits for it."""

import asyncio


class Pulse:
    """Used from one event loop only."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def tell(self) -> None:
        """Wake everybody who waits now."""
        self._next.set()
        self._next = asyncio.Event()

    async def wait(self) -> None:
        """Return when it is told the next time."""
        await self._next.wait()
