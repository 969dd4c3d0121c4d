"""A live service as a trainer meets it: `shopr1 serve` on the embedded policy, in an environment of its own.

Not part of `make test`. `make test-trainers` runs each file in an environment with its trainer, from PyPI,
and this project's base install; `make test-trainer-trl` one of them.
"""

from collections.abc import Iterator

import pytest

from tests.integration.trainers.live import API_KEY, Live
from tests.integration.trainers.serving import serving


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """A service that is ready to score."""
    with serving() as service:
        yield service


@pytest.fixture
def environment(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment variables that tell a shim where the service is."""
    monkeypatch.setenv("SHOPR1_CLIENT_URL", live.url)
    monkeypatch.setenv("SHOPR1_CLIENT_API_KEY", API_KEY)
