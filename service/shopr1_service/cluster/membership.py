"""Which engines there are, and which change each has made."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shopr1_service.cluster.messages import Report

logger = logging.getLogger(__name__)

_LIFE_S = 2.0
"""How often it is looked whether they are alive."""


@dataclass
class _Engine:
    """What is known of one.

    Attributes:
        number: of the last change that it has made.
        is_ready: it has caught up once.
    """

    actor: Any
    number: int
    is_ready: bool = False


class Membership:
    """See the module.

    Args:
        tell: called when it has changed.
        lives: whether a process does, by its handle.
    """

    def __init__(self, tell: Callable[[], None], lives: Callable[[Any], Awaitable[bool]]) -> None:
        self._tell = tell
        self._lives = lives
        self._engines: dict[str, _Engine] = {}
        self._life: asyncio.Task[None] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._engines

    @property
    def ready(self) -> Mapping[str, int]:
        """Those in rotation, and the number of the last change of each."""
        return {name: engine.number for name, engine in self._engines.items() if engine.is_ready}

    def hear(self, report: Report) -> None:
        """An engine has said where it is."""
        self._life = self._life or asyncio.create_task(self._watch())
        if report.engine not in self._engines:
            self._engines[report.engine] = _Engine(report.actor, report.known)
        self.advance(report.engine, report.known)

    def advance(self, name: str, number: int) -> None:
        """It has made a change."""
        if (engine := self._engines.get(name)) is not None and engine.number < number:
            engine.number = number
            self._tell()

    def enter(self, name: str) -> None:
        """It has caught up, and is in rotation."""
        if (engine := self._engines.get(name)) is not None and not engine.is_ready:
            engine.is_ready = True
            self._tell()

    def lose(self, name: str) -> None:
        """It is gone."""
        if self._engines.pop(name, None) is not None:
            logger.warning("engine %s is gone", name)
            self._tell()

    def has_made(self, name: str, number: int) -> bool:
        """Or is gone: whoever comes in its place makes the change before it is ready."""
        return name not in self._engines or self._engines[name].number >= number

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LIFE_S)
            actors = {name: engine.actor for name, engine in self._engines.items()}
            lives = await asyncio.gather(*map(self._lives, actors.values()))
            for name, is_alive in zip(actors, lives, strict=True):
                if not is_alive:
                    self.lose(name)
