"""The machine's clock is changed while the service runs; the service is not affected.

libfaketime, between the process and the C library, changes the clock. Monotonic time is not changed.
"""

import time
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.ops.supervised import ROOT, Supervised, batches, checkpoint, score_all, until
from tests.support.http import WAIT_S

pytestmark = pytest.mark.timeout(600)

DAY_S = 86_400
_LIBRARY = "usr/lib/*/faketime/libfaketimeMT.so.1"


@pytest.fixture
def library() -> Path:
    """Debian's libfaketime, installed or downloaded by `make test-ops`."""
    for root in (Path("/"), ROOT / ".tools" / "libfaketime"):
        for path in root.glob(_LIBRARY):
            return path
    pytest.fail("libfaketime is missing: `make .tools/libfaketime`, or install Debian's package of that name")


def metric(url: str, name: str) -> float:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def is_ahead(url: str, num_days: int) -> bool:
    """Whether the clock in the service's responses is `num_days` days ahead of this process's clock."""
    date = parsedate_to_datetime(httpx.get(f"{url}/health/live").headers["Date"])
    return round((date.timestamp() - time.time()) / DAY_S) == num_days


def set_clock(file: Path, offset: str) -> None:
    new = file.with_suffix(".new")
    new.write_text(offset)
    new.replace(file)


def test_a_clock_that_jumps(library: Path, tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    set_clock(clock, "+0")
    service = Supervised(
        tmp_path,
        *("-m", "shopr1_service", "serve"),
        SHOPR1_POLICY=str(checkpoint(tmp_path / "policy")),
        SHOPR1_DETERMINISTIC="true",
        SHOPR1_ENGINE_TIMEOUT_S="30",
        LD_PRELOAD=str(library),
        FAKETIME_TIMESTAMP_FILE=str(clock),
        FAKETIME_NO_CACHE="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
    )
    requests = batches()
    start_s = time.monotonic()
    with service.running():
        service.ready(3 * WAIT_S)  # each look at the clock reads a file: the start is slow
        before, pid = score_all(service.url, requests[:5]), service.pid()
        for num_days in (1, -400, 0):
            set_clock(clock, f"{num_days:+}d")
            until(partial(is_ahead, service.url, num_days), "its clock has not changed")
            # Duplicate requests come from memory, whose entries expire by time; the others are computed.
            assert score_all(service.url, requests[:5]) == before
            assert len(score_all(service.url, requests[5:])) == len(requests) - 5
            # The age of the policy does not depend on the clock.
            loaded_s = metric(service.url, "shopr1_policy_loaded_timestamp_seconds")
            age_s = time.time() + num_days * DAY_S - loaded_s
            assert 0 < age_s < time.monotonic() - start_s + 1
        assert service.pid() == pid
        assert service.exits() == []
