"""Forms of the ground truth in a trainer's label, read through two dialects."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from shopr1_service.policy.fake import FakePolicy
from tests.support.http import (
    CLICK,
    TERMINATE,
    answer,
    problem,
    running,
)
from tests.support.labels import FORMS, WRONG
from tests.support.trainer_requests import OPENRLHF, SLIME, openrlhf, send, send_ok, slime

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[httpx.AsyncClient]:
    async with running(FakePolicy(26.0)) as client:
        yield client


@pytest.mark.parametrize("label", FORMS.values(), ids=FORMS)
async def test_forms_of_a_label(service: httpx.AsyncClient, label: Any) -> None:
    assert await send_ok(service, SLIME, slime(response=answer(CLICK), label=label)) == 1001.13


@pytest.mark.parametrize(("label", "path"), WRONG.values(), ids=WRONG)
async def test_invalid_labels(service: httpx.AsyncClient, label: Any, path: str) -> None:
    sent = openrlhf(("page", answer(), TERMINATE), ("page", answer(), label))
    refused = problem(await send(service, OPENRLHF, sent), 422, "invalid_request")
    assert [error["location"] for error in refused["errors"]] == [f"labels[1]{path}"]
    assert refused["errors"][0]["message"]
