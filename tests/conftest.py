"""Settings of all tests, isolated from the developer's environment and from model hubs."""

import os

import pytest
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"
# On models as small as the tests', threads only wait for each other; other workers use the other cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for _name in [name for name in os.environ if name.upper().startswith("SHOPR1_")]:
    del os.environ[_name]
os.environ["SHOPR1_CACHE_BYTES"] = "0"  # no test finds what another has kept, or the developer's own service

settings.register_profile(
    "tests",
    max_examples=100,
    deadline=None,  # a busy machine must not fail a test
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"
