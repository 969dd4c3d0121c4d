"""API keys and their scopes.

A key is written `[scope[+scope]:]key`, in `api_keys` or on a line of `api_key_file`:

    score:3f6c…        may score rollouts, and read what is needed for it
    metrics:77aa…      may scrape /metrics
    admin:e90b…        may do everything
    3f6c…              without a scope: score and metrics

Several are valid at once, so that they can be rotated one by one. The file is read again when it changes:
keys can be added and removed while the service runs.
"""

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from shopr1_service.errors import SettingsError
from shopr1_service.settings import Settings

logger = logging.getLogger(__name__)

_KEY = re.compile(r"[A-Za-z0-9._~-]{16,256}")
_RELOAD_INTERVAL_S = 1.0


class Scope(StrEnum):
    """A kind of route that a key opens."""

    SCORE = "score"
    METRICS = "metrics"
    ADMIN = "admin"


_DEFAULT_SCOPES = frozenset({Scope.SCORE, Scope.METRICS})
_ALL_SCOPES = frozenset(Scope)


@dataclass(frozen=True)
class ApiKey:
    """SHA-256 digest of a key, with its scopes."""

    digest: bytes
    scopes: frozenset[Scope]


class ApiKeys:
    """The valid keys.

    Args:
        keys: without any, and without a file, everybody may do everything.
        file: file of further keys.

    Raises:
        SettingsError: the file cannot be read or holds no key.
    """

    def __init__(self, keys: Sequence[ApiKey] = (), file: Path | None = None) -> None:
        self._fixed = keys
        self._file = file
        self._file_state = _state(file)
        self._file_keys = _read(file) if file else []
        self._checked_s = time.monotonic()

    @classmethod
    def of(cls, settings: Settings) -> "ApiKeys":
        """The keys in the settings and in the file that they name."""
        given = [key.get_secret_value() for key in settings.api_keys]
        return cls(_parse(given, "api_keys"), settings.api_key_file)

    def scopes(self, given: bytes | None) -> frozenset[Scope]:
        """The scopes of a key that a client sent; none if it is not valid."""
        if self._file is None and not self._fixed:
            return _ALL_SCOPES
        self._reload_if_changed()
        if given is None:
            return frozenset()
        # All are compared, each in constant time: the time taken reveals nothing about any of them.
        digest, found = _digest(given), frozenset[Scope]()
        for key in (*self._fixed, *self._file_keys):
            found = key.scopes if hmac.compare_digest(key.digest, digest) else found
        return found

    def _reload_if_changed(self) -> None:
        """Load the file's keys if it has changed; while it is broken, the previous ones stay valid."""
        now_s = time.monotonic()
        if self._file is None or now_s - self._checked_s < _RELOAD_INTERVAL_S:
            return
        self._checked_s = now_s
        if (state := _state(self._file)) == self._file_state:
            return
        self._file_state = state
        try:
            self._file_keys = _read(self._file)
        except SettingsError as error:
            logger.error("the previous keys stay valid: %s", error)
        else:
            logger.info("api_key_file has changed: %d keys", len(self._file_keys))


def _state(file: Path | None) -> object:
    """A value that changes when the file does, also when it is a link whose target changes."""
    try:
        stat = file.stat() if file else None
    except OSError as error:
        return error.errno
    return stat and (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)


def _read(file: Path) -> list[ApiKey]:
    """Keys of a file, one per line; empty lines and those that begin with # are skipped."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"api_key_file: cannot read {str(file)!r}: {error}") from error
    keys = _parse((line for line in lines if line and not line.startswith("#")), f"api_key_file {file}")
    if not keys:  # a secret that was not mounted must not open the service
        raise SettingsError(f"api_key_file: {str(file)!r} holds no key")
    return keys


def _parse(given: Iterable[str], source: str) -> list[ApiKey]:
    return [_key(text, f"{source}: API key {number}") for number, text in enumerate(given, 1)]


def _key(text: str, where: str) -> ApiKey:
    names, separator, key = text.rpartition(":")
    if not _KEY.fullmatch(key):  # not shown: it may be a mistyped key
        raise SettingsError(f"{where}: must be 16 to 256 of A-Z a-z 0-9 . _ ~ -")
    try:
        scopes = frozenset(map(Scope, names.split("+"))) if separator else _DEFAULT_SCOPES
    except ValueError:
        raise SettingsError(f"{where}: its scopes must be of {', '.join(Scope)}, with + between") from None
    return ApiKey(_digest(key.encode()), _ALL_SCOPES if Scope.ADMIN in scopes else scopes)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
