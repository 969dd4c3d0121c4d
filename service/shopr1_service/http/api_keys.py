"""Who may do what: API keys and their scopes.

A key is written `[scope[+scope]:]key`, in `api_keys` or on a line of `api_key_file`:

    score:3f6c…        may have rollouts scored, and read what it needs for it
    metrics:77aa…      may scrape /metrics
    admin:e90b…        may do everything
    3f6c…              without a scope: score and metrics

Several hold at once, so that they can be changed one by one. The file is read again when it changes: a key
can come and go while the service runs.
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
_LOOK_AGAIN_AFTER_S = 1.0


class Scope(StrEnum):
    """What a key may be good for."""

    SCORE = "score"
    METRICS = "metrics"
    ADMIN = "admin"


_DEFAULT = frozenset({Scope.SCORE, Scope.METRICS})
_EVERYTHING = frozenset(Scope)


@dataclass(frozen=True)
class ApiKey:
    """A key, of which only a digest is kept."""

    digest: bytes
    scopes: frozenset[Scope]


class ApiKeys:
    """The keys that are accepted.

    Args:
        keys: none at all, and no file, lets everybody do everything.
        file: of further keys.

    Raises:
        SettingsError: the file cannot be read or holds no key, or a key is none.
    """

    def __init__(self, keys: Sequence[ApiKey] = (), file: Path | None = None) -> None:
        self._fixed = keys
        self._file = file
        self._file_state = _state(file)
        self._of_file = _read(file) if file else []
        self._looked_s = time.monotonic()

    @classmethod
    def of(cls, settings: Settings) -> "ApiKeys":
        """Those of the settings and of the file that they name."""
        given = [key.get_secret_value() for key in settings.api_keys]
        return cls(_parse(given, "api_keys"), settings.api_key_file)

    def scopes(self, given: bytes | None) -> frozenset[Scope]:
        """What whoever sends this may do; nothing, if it is no key."""
        if self._file is None and not self._fixed:
            return _EVERYTHING
        self._look_again()
        if given is None:
            return frozenset()
        # All are compared, each in constant time: how long it takes says nothing about any of them.
        digest, found = _digest(given), frozenset[Scope]()
        for key in (*self._fixed, *self._of_file):
            found = key.scopes if hmac.compare_digest(key.digest, digest) else found
        return found

    def _look_again(self) -> None:
        """Take over the file's keys if it has changed; while it is broken, the ones from before hold."""
        now_s = time.monotonic()
        if self._file is None or now_s - self._looked_s < _LOOK_AGAIN_AFTER_S:
            return
        self._looked_s = now_s
        if (state := _state(self._file)) == self._file_state:
            return
        self._file_state = state
        try:
            self._of_file = _read(self._file)
        except SettingsError as error:
            logger.error("the keys from before still hold: %s", error)  # says it all
        else:
            logger.info("api_key_file has changed: %d keys", len(self._of_file))


def _state(file: Path | None) -> object:
    """Differs when the file does, also when it is a link that points elsewhere now."""
    try:
        stat = file.stat() if file else None
    except OSError as error:
        return error.errno
    return stat and (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)


def _read(file: Path) -> list[ApiKey]:
    """Keys of a file, one a line; empty lines and those that begin with # are skipped."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"api_key_file: cannot read {str(file)!r}: {error}") from error
    keys = _parse((line for line in lines if line and not line.startswith("#")), f"api_key_file {file}")
    if not keys:  # a secret that was not mounted must not open the service to everybody
        raise SettingsError(f"api_key_file: {str(file)!r} holds no key")
    return keys


def _parse(given: Iterable[str], source: str) -> list[ApiKey]:
    return [_key(text, f"{source}: API key {number}") for number, text in enumerate(given, 1)]


def _key(text: str, where: str) -> ApiKey:
    names, separator, key = text.rpartition(":")
    if not _KEY.fullmatch(key):  # not shown: it may be a key with a typing error
        raise SettingsError(f"{where}: must be 16 to 256 of A-Z a-z 0-9 . _ ~ -")
    try:
        scopes = frozenset(map(Scope, names.split("+"))) if separator else _DEFAULT
    except ValueError:
        raise SettingsError(f"{where}: its scopes must be of {', '.join(Scope)}, with + between") from None
    return ApiKey(_digest(key.encode()), _EVERYTHING if Scope.ADMIN in scopes else scopes)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
