"""What is done with what Ray raises. The handle is a fake: what it raises is Ray's own."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError

from shopr1_client.errors import NotReadyError, OverloadedError
from shopr1_client.wire_policy import VersionDemand
from shopr1_rewards import load_recipe
from shopr1_service.cluster.engine_replica import Description
from shopr1_service.cluster.messages import ClusterView, Declined, Route
from shopr1_service.cluster.remote_policy import RemoteEngines
from shopr1_service.core import (
    Certainty,
    Kind,
    MeasuredCompletion,
    Measurements,
    PromptKey,
    Target,
    TokenGroup,
    Version,
)
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.fake import FakePolicy

pytestmark = pytest.mark.anyio

KIND = Kind(load_recipe("shop_r1").self_certainty)
GROUP = TokenGroup(PromptKey((1, 2, 3)), [MeasuredCompletion((4, 5), (0, 1))])
MEASURED = Measurements([Certainty((26.0, 26.0))], Version("0"))
DIED = ActorDiedError()


class Response:
    """Ray's future, of an outcome that is known; None never comes."""

    def __init__(self, outcome: Any) -> None:
        self.is_cancelled = False
        self._outcome = outcome

    def __await__(self) -> Any:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        if self._outcome is None:
            await asyncio.Event().wait()
        if isinstance(self._outcome, Exception) and not isinstance(self._outcome, OverloadedError):
            raise self._outcome
        return self._outcome

    def cancel(self) -> None:
        self.is_cancelled = True


class Handle:
    """Gives one outcome after the other."""

    def __init__(self, *outcomes: Any) -> None:
        self.measure = self
        self.responses: list[Response] = []
        self.routes: list[Route] = []
        self._outcomes: Iterator[Any] = iter(outcomes)

    def remote(self, _group: TokenGroup, _kind: Kind, route: Route) -> Response:
        self.routes.append(route)
        self.responses.append(Response(next(self._outcomes)))
        return self.responses[-1]


def fleet_of(handle: Handle) -> RemoteEngines:
    policy = FakePolicy()
    description = Description(policy.info, policy.codec, 1, 1)
    return RemoteEngines(handle, None, description, ClusterView(0, policy.versions), Metrics())


async def test_work_of_a_replica_that_dies_goes_to_another() -> None:
    handle = Handle(DIED, ActorUnavailableError("x", b"0" * 16), MEASURED)
    assert await fleet_of(handle).compute_certainties([GROUP], KIND) == [MEASURED]
    assert len(handle.responses) == 3


async def test_work_that_kills_replicas_is_given_up() -> None:
    handle = Handle(*[DIED] * 9)
    with pytest.raises(NotReadyError, match="5 replicas died"):
        await fleet_of(handle).compute_certainties([GROUP], KIND)
    assert len(handle.responses) == 5


@pytest.mark.parametrize("refusal", [OverloadedError("full", retry_after_s=3.0), BackPressureError(9, 9)])
async def test_a_refused_group_refuses_all_and_the_others_are_cancelled(refusal: Exception) -> None:
    handle = Handle(None, refusal, None)
    with pytest.raises(OverloadedError) as caught:
        await fleet_of(handle).compute_certainties([GROUP] * 3, KIND)
    assert caught.value.retry_after_s
    await asyncio.sleep(0)
    assert [response.is_cancelled for response in handle.responses] == [True, False, True]


async def test_a_replica_that_must_not_answer_is_not_asked_again() -> None:
    behind = Declined("a", NotReadyError("behind", retry_after_s=1.0))
    handle = Handle(behind, MEASURED)
    fleet = fleet_of(handle)
    fleet.view = ClusterView(1, fleet.versions, 0, {0: fleet.versions}, {"a": 0, "b": 0})
    assert await fleet.compute_certainties([GROUP], KIND) == [MEASURED]
    assert [route.among for route in handle.routes] == [frozenset("ab"), frozenset("b")]


async def test_when_none_may_answer_the_last_one_says_why() -> None:
    handle = Handle(*(Declined(name, NotReadyError(f"{name} is behind")) for name in "ab"))
    fleet = fleet_of(handle)
    fleet.view = ClusterView(1, fleet.versions, 0, {0: fleet.versions}, {"a": 0, "b": 0})
    with pytest.raises(NotReadyError, match="b is behind"):
        await fleet.compute_certainties([GROUP], KIND)


async def test_a_demand_goes_to_those_that_can_meet_it() -> None:
    handle = Handle(MEASURED)
    fleet = fleet_of(handle)
    old = fleet.versions
    new = old.with_base("x", 0.0)
    fleet.view = ClusterView(1, new, 0, {0: old, 1: new}, {"a": 0, "b": 1})
    await fleet.compute_certainties([GROUP], Kind(KIND.rules, Target(demand=VersionDemand(exact="x"))))
    assert handle.routes == [Route(frozenset("b"), 0)]


def test_answers_of_versions_that_are_going_are_not_those_of_the_next() -> None:
    """While engines have two versions, an answer is kept as of the former one, whichever it is of."""
    fleet = fleet_of(Handle())
    old = fleet.versions
    new = old.with_base("x", 0.0)
    fleet.view = ClusterView(1, new, 0, {0: old, 1: new}, {"a": 0, "b": 1})
    assert (fleet.settled_number, fleet.info.version) == (0, "x")
    fleet.view = ClusterView(2, new, 1, {1: new}, {"a": 1, "b": 1})
    assert fleet.settled_number == 1


async def test_nothing_to_measure_needs_nobody() -> None:
    handle = Handle()
    [measured] = await fleet_of(handle).compute_certainties([TokenGroup(PromptKey(()), [])], KIND)
    assert measured.values == []
    assert measured.version.name == "0"
