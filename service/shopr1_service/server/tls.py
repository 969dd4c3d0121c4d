"""The certificate of a service that accepts HTTPS, checked before it is used."""

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shopr1_service.errors import SettingsError
from shopr1_service.settings import Settings


def tls_options(settings: Settings) -> Mapping[str, Any]:
    """Uvicorn's options for HTTPS; none without a certificate.

    Raises:
        SettingsError: one of the files is not given, cannot be read, or does not fit the other.
    """
    cert, key = settings.tls_cert_file, settings.tls_private_key_file
    if cert is None and key is None:
        return {}
    if cert is None or key is None:
        raise SettingsError("tls_cert_file and tls_private_key_file must be given together")
    _check_readable("tls_cert_file", cert)
    _check_readable("tls_private_key_file", key)
    _check_pair(cert, key)
    return {"ssl_certfile": cert, "ssl_keyfile": key}


def _check_readable(name: str, path: Path) -> None:
    try:
        path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no path at all
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"{name}: cannot read {str(path)!r}: {reason}") from error


def _check_pair(cert: Path, key: Path) -> None:
    asked: list[bool] = []

    def answer() -> bytes:
        asked.append(True)  # without an answer OpenSSL would ask at the terminal
        return b""

    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key, password=answer)
    except (OSError, ssl.SSLError) as error:
        if asked:
            raise SettingsError(f"tls_private_key_file: {str(key)!r} has a passphrase: remove it") from error
        message = f"cannot use {str(cert)!r} with the key in {str(key)!r}: {error}"
        raise SettingsError(f"tls_cert_file, tls_private_key_file: {message}") from error
