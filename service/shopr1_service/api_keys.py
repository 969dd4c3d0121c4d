"""Who may ask: API keys.

A key comes as a bearer token or, from trainers that cannot send headers, in the URL:

    Authorization: Bearer <key>
    http://host:8000/key/<key>/dialects/slime/reward         before any route
    http://host:8000/dialects/slime/reward?api_key=<key>

URLs end up in other people's logs: a header is better where it can be sent. In this service's own logs no key
stands: it is taken out of the URL before anything else sees it.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from shopr1_client.errors import UnauthenticatedError
from shopr1_service.errors import SettingsError
from shopr1_service.problems import problem_response
from shopr1_service.request_id import request_id_of
from shopr1_service.settings import Settings

OPEN_PATHS = "/health/"
"""Supervisors and load balancers have no keys."""
QUERY_NAME = "api_key"

_KEY = re.compile(r"[A-Za-z0-9._~-]{16,256}")
_IN_PATH = re.compile(rb"/key/([^/?]*)(/.*)")


class ApiKeys:
    """The keys that are accepted.

    Args:
        keys: none at all lets everybody in.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    @classmethod
    def of(cls, settings: Settings) -> "ApiKeys":
        """Those of the settings and of the file that they name.

        Raises:
            SettingsError: the file cannot be read or holds no key, or a key is none.
        """
        keys = [key.get_secret_value() for key in settings.api_keys]
        if settings.api_key_file is not None:
            keys += _read(settings.api_key_file)
        for number, key in enumerate(keys, 1):
            if not _KEY.fullmatch(key):  # not shown: it may be a key with a typing error
                raise SettingsError(f"API key {number}: must be 16 to 256 of A-Z a-z 0-9 . _ ~ -")
        return cls(keys)

    def accept(self, given: bytes | None) -> bool:
        """Whether this is a key, or none is needed."""
        if not self._digests:
            return True
        if given is None:
            return False
        # All are compared, each in constant time: how long it takes says nothing about any of them.
        digest = _digest(given)
        return sum(hmac.compare_digest(known, digest) for known in self._digests) > 0


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _read(file: Path) -> list[str]:
    """Keys of a file, one a line; empty lines and those that begin with # are skipped."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"api_key_file: cannot read {str(file)!r}: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:  # a secret that was not mounted must not open the service to everybody
        raise SettingsError(f"api_key_file: {str(file)!r} holds no key")
    return keys


class KeyCheck:
    """ASGI middleware: answers 401 to who has no key."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            given = _take_key(scope)
            if not scope["path"].startswith(OPEN_PATHS) and not self._keys.accept(given):
                what = "no API key" if given is None else "not a valid API key"
                problem = UnauthenticatedError(f"{what}; send `Authorization: Bearer <key>`")
                app = problem_response(problem, request_id_of(scope), {"WWW-Authenticate": "Bearer"})
        await app(scope, receive, send)


def _take_key(scope: MutableMapping[str, Any]) -> bytes | None:
    """The key of a request, which is taken out of its URL: from the header, else the path, else the query."""
    in_query = _take_from_query(scope)
    in_path = _take_from_path(scope)
    scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip().encode("latin-1")
    return in_path if in_path is not None else in_query


def _take_from_path(scope: MutableMapping[str, Any]) -> bytes | None:
    match = _IN_PATH.fullmatch(scope["path"].encode())
    if match is None:
        return None
    scope["path"] = match[2].decode()
    # As it was sent, with the escapes; a key has none.
    if raw := _IN_PATH.fullmatch(scope.get("raw_path") or b""):
        scope["raw_path"] = raw[2]
    return match[1]


def _take_from_query(scope: MutableMapping[str, Any]) -> bytes | None:
    if QUERY_NAME.encode() not in scope["query_string"]:
        return None
    pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    scope["query_string"] = urlencode([pair for pair in pairs if pair[0] != QUERY_NAME]).encode("latin-1")
    return next((value.encode() for name, value in pairs if name == QUERY_NAME), None)
