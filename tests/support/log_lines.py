"""Log lines of one logger, as the service would write them."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shopr1_service.monitoring.logs import JsonFormatter


class Noting(logging.Handler):
    """Lines as they would be written, of one logger."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Any] = []

    def emit(self, made: logging.LogRecord) -> None:
        self.lines.append(json.loads(JsonFormatter().format(made)))


@contextmanager
def noting(name: str) -> Iterator[list[Any]]:
    logger, handler = logging.getLogger(name), Noting()
    former = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(former)
