"""A live service for trainers: `shopr1 serve` with the embedded policy, in the project's own environment.

Not part of `make test`. `make test-trainers` runs each file in an environment with its trainer, from PyPI,
and this project's base install; `make test-trainer-trl` runs one of them.
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
    """The environment variables with the service's URL and key for the shims."""
    monkeypatch.setenv("SHOPR1_CLIENT_URL", live.url)
    monkeypatch.setenv("SHOPR1_CLIENT_API_KEY", API_KEY)
