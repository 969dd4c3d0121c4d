"""Log lines: text for people or one JSON object per line for machines, with the request that each belongs to.

A client cannot begin a line of its own: in JSON its text stays inside a string, in text control characters
are escaped. No line holds keys or what was scored: our own code logs none of it, and exceptions whose
messages quote their input are logged without their message.

structlog is not used: what it would replace is `json.dumps`. Hidden messages, escapes and tolerance of broken
log calls would be processors of the same length, and stamina, once it finds structlog, logs to standard
output.
"""

import json
import logging
import math
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

from asgi_correlation_id import correlation_id
from fastapi.exceptions import ValidationException
from pydantic import ValidationError

from shopr1_client.errors import ProblemError
from shopr1_rewards.errors import RewardsError
from shopr1_service.core import CodecError
from shopr1_service.settings import LogFormat, Settings

current_run: ContextVar[str] = ContextVar("shopr1_run", default="")
"""Run of the current request. The engine's thread works for many requests at once, and has none."""

_QUOTING = (ProblemError, RewardsError, CodecError, ValidationError, ValidationException, KeyError)
"""Exceptions whose messages quote a client's input."""
_HIDDEN = "(not shown: it may quote a request)"
_MAX_FRAMES = 50

# `color_message` is uvicorn's, with escapes for terminals; `taskName` numbers asyncio's tasks.
_NO_EXTRAS = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "color_message", "taskName"})
# Every character that some reader takes for the end of a line, or that terminals interpret.
_ESCAPES = {code: ascii(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}


@contextmanager
def logging_to_stderr(settings: Settings) -> Iterator[None]:
    """Send all log records of this process, and Python's warnings, to standard error."""
    handler = _Handler(sys.stderr)
    handler.setFormatter(_formatter(settings.log_format, sys.stderr))
    root = logging.getLogger()
    _take_over_libraries()
    logging.captureWarnings(True)
    root.setLevel(settings.log_level.upper())
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        logging.captureWarnings(False)


def writes_json(log_format: LogFormat) -> bool:
    """Whether lines on standard error are JSON."""
    return isinstance(_formatter(log_format, sys.stderr), JsonFormatter)


def write_as_json(message: str, error: BaseException | None = None) -> None:
    """Write the line of an error that ends the process before logging has begun, or after it has ended."""
    exc_info = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("shopr1_service", logging.CRITICAL, __file__, 0, "%s", (message,), exc_info)
    handler = _Handler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    handler.emit(record)


class JsonFormatter(logging.Formatter):
    """One JSON object per line, in ASCII, so that all readers agree on where a line ends."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **_request(),
        }
        if error := _error(record):
            stack = _clean("".join(_stack(error, set())))
            fields["exception"] = {"type": _type(error), "message": _error_message(error), "stack": stack}
        # An extra field cannot replace the level or the time.
        return json.dumps(fields | _extras(record) | fields)


class TextFormatter(logging.Formatter):
    """One line per record; a stack trace follows, indented, so that it cannot look like a record."""

    def format(self, record: logging.LogRecord) -> str:
        context = " ".join(_request().values())
        extras = "".join(f" {name}={value}" for name, value in _extras(record).items())
        where = f"{record.name} [{context}]" if context else record.name
        line = f"{_time(record)} {record.levelname} {where}: {_message(record)}{extras}"
        lines = [line.translate(_ESCAPES)]
        if error := _error(record):
            lines += [f"    {each.translate(_ESCAPES)}" for each in "".join(_stack(error, set())).split("\n")]
        return "\n".join(lines).rstrip()


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        """Do nothing: Python's own would write the raw record to the stream that has just failed."""


def _formatter(log_format: LogFormat, stream: TextIO) -> logging.Formatter:
    is_text = stream.isatty() if log_format is LogFormat.AUTO else log_format is LogFormat.TEXT
    return TextFormatter() if is_text else JsonFormatter()


def _take_over_libraries() -> None:
    """Remove the handlers of transformers and torch, which are imported by now. Their levels stay."""
    for known in list(logging.root.manager.loggerDict.values()):
        if isinstance(known, logging.Logger) and known.handlers:
            known.handlers.clear()
            known.propagate = True


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")[:-6] + "Z"


def _request() -> dict[str, str]:
    fields = {"request_id": correlation_id.get(), "run": current_run.get()}
    return {name: value for name, value in fields.items() if value}


def _message(record: logging.LogRecord) -> str:
    try:
        message = record.getMessage()
    except Exception:  # a library's bug; the arguments may be anything
        message = f"{record.msg} (its arguments do not fit)"
    if record.name == "asyncio" and record.exc_info:
        # The following lines show the task and its exception, whose message may quote a request.
        message = message.partition("\n")[0]
    return _clean(message.rstrip("\n"))


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {name: _plain(value) for name, value in vars(record).items() if name not in _NO_EXTRAS}


def _plain(value: object) -> object:
    """A value that JSON can express, or else its text."""
    match value:
        case int() | None:
            return value
        case float() if math.isfinite(value):
            return value
        case dict():
            return {_clean(str(key)): _plain(each) for key, each in value.items()}
        case list():
            return [_plain(each) for each in value]
        case _:
            return _clean(str(value))


def _clean(text: str) -> str:
    """Text with half surrogate pairs, which cannot be encoded, as escapes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


# --- exceptions -------------------------------------------------------------------------------------


def _error(record: logging.LogRecord) -> BaseException | None:
    return record.exc_info[1] if record.exc_info else None


def _type(error: BaseException) -> str:
    module, name = type(error).__module__, type(error).__qualname__
    return name if module == "builtins" else f"{module}.{name}"


def _error_message(error: BaseException) -> str:
    if isinstance(error, _QUOTING):
        return _HIDDEN
    try:
        return _clean(str(error))
    except Exception as failure:  # a second failure must not hide the first
        return f"(cannot be shown: {type(failure).__name__})"


def _stack(error: BaseException, seen: set[int]) -> Iterator[str]:
    """The traceback as Python prints it, causes first, without messages that may quote a request."""
    seen.add(id(error))
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None and id(cause) not in seen:
        yield from _stack(cause, seen)
        yield "\nand after that:\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__, -_MAX_FRAMES)
    yield f"{_type(error)}: {_error_message(error).translate(_ESCAPES)}\n"
    for part in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        yield "\none of them:\n"
        yield from _stack(part, seen)
