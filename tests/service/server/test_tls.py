"""Certificate and key, checked at start."""

import subprocess
from pathlib import Path

import pytest

from shopr1_service.errors import SettingsError
from shopr1_service.server.tls import tls_options
from shopr1_service.settings import Settings


def flaw(cert: Path, key: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        tls_options(Settings(tls_cert_file=cert, tls_private_key_file=key))
    return str(caught.value)


def test_options(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    options = tls_options(Settings(tls_cert_file=cert, tls_private_key_file=key))
    assert options == {"ssl_certfile": cert, "ssl_keyfile": key}
    assert tls_options(Settings()) == {}


def test_files_that_cannot_be_read(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    missing = tmp_path / "missing.pem"
    assert flaw(missing, key) == f"tls_cert_file: cannot read {str(missing)!r}: No such file or directory"
    assert flaw(cert, tmp_path) == f"tls_private_key_file: cannot read {str(tmp_path)!r}: Is a directory"


def test_files_that_do_not_fit(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    for pair in ((cert, cert), (key, key), (key, cert)):
        expected = f"cannot use {str(pair[0])!r} with the key in {str(pair[1])!r}: "
        assert flaw(*pair).startswith(f"tls_cert_file, tls_private_key_file: {expected}")


def test_a_key_with_a_passphrase(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    """OpenSSL would ask for it at the terminal."""
    cert, key = certificate
    locked = tmp_path / "locked.pem"
    command = [
        "openssl",
        "pkey",
        "-in",
        str(key),
        "-aes256",
        "-passout",
        "pass:invented",
        "-out",
        str(locked),
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert flaw(cert, locked) == f"tls_private_key_file: {str(locked)!r} has a passphrase: remove it"
