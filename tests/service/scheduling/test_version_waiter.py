"""Requests that wait for a version: woken when it is loaded, and at their deadline."""

import asyncio

import pytest

from shopr1_client.errors import InvalidRequestError, PolicyVersionError
from shopr1_client.wire_policy import VersionDemand
from shopr1_service.core import Target, Version
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.version_waiter import VersionWaiter

pytestmark = pytest.mark.anyio

LONG_S = 120.0


@pytest.fixture
def policy() -> FakePolicy:
    return FakePolicy()


@pytest.fixture
def new_versions(policy: FakePolicy) -> VersionWaiter:
    return VersionWaiter(lambda: policy.versions)


def target(wait_s: float = LONG_S, **demand: str | int) -> Target:
    return Target(None, VersionDemand(wait_s=wait_s, **demand))


async def waiting(new_versions: VersionWaiter, wanted: Target) -> asyncio.Task[None]:
    """A task that is waiting."""
    task = asyncio.create_task(new_versions.wait_for(wanted))
    await asyncio.sleep(0)
    assert not task.done()
    return task


def update(policy: FakePolicy, name: str) -> None:
    policy.versions = policy.versions.with_base(name, 0.0)


@pytest.mark.parametrize("wanted", [Target(), target(exact="0"), target(at_least=0, wait_s=0.0)])
async def test_a_loaded_version_needs_no_wait(new_versions: VersionWaiter, wanted: Target) -> None:
    await new_versions.wait_for(wanted)


async def test_each_request_is_woken_by_its_own_version(
    policy: FakePolicy, new_versions: VersionWaiter
) -> None:
    first = await waiting(new_versions, target(exact="one"))
    second = await waiting(new_versions, target(at_least="two"))
    update(policy, "one")
    new_versions.notify()
    await first
    assert not second.done()
    update(policy, "two")
    new_versions.notify()
    await second


async def test_an_exact_version_that_was_replaced_is_refused(
    policy: FakePolicy, new_versions: VersionWaiter
) -> None:
    late = await waiting(new_versions, target(exact=1))
    update(policy, "one")
    update(policy, "two")
    new_versions.notify()
    with pytest.raises(PolicyVersionError) as caught:
        await late
    assert caught.value.retry_after_s is None


async def test_without_a_wait_the_client_may_retry(new_versions: VersionWaiter) -> None:
    with pytest.raises(PolicyVersionError) as caught:
        await new_versions.wait_for(target(at_least=1, wait_s=0.0))
    assert caught.value.retry_after_s is not None


async def test_the_wait_ends_at_the_deadline(new_versions: VersionWaiter) -> None:
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    with pytest.raises(
        PolicyVersionError, match="version 1 or a later one is demanded, '0' is loaded"
    ) as caught:
        await new_versions.wait_for(target(at_least=1, wait_s=0.05))
    assert caught.value.retry_after_s is not None
    assert loop.time() - start_s >= 0.05


async def test_other_changes_do_not_extend_the_wait(policy: FakePolicy, new_versions: VersionWaiter) -> None:
    task = asyncio.create_task(new_versions.wait_for(target(at_least=10**9, wait_s=0.05)))
    while not task.done():
        update(policy, "other")
        new_versions.notify()
        await asyncio.sleep(0)
    assert isinstance(task.exception(), PolicyVersionError)


async def test_an_adapter_that_is_unloaded_during_the_wait(
    policy: FakePolicy, new_versions: VersionWaiter
) -> None:
    added = Version("x", 1, "a")
    policy.versions = policy.versions.with_adapter(added, max_kept=1, is_default=False)
    task = await waiting(new_versions, Target("a", VersionDemand(at_least="y", wait_s=LONG_S)))
    policy.versions = policy.versions.without([added])
    new_versions.notify()
    with pytest.raises(InvalidRequestError, match="no adapter 'a' is loaded"):
        await task
    with pytest.raises(InvalidRequestError):
        await new_versions.wait_for(Target("b", VersionDemand(at_least="y", wait_s=LONG_S)))


async def test_a_cancelled_request_does_not_affect_the_others(
    policy: FakePolicy, new_versions: VersionWaiter
) -> None:
    gone, there = [await waiting(new_versions, target(exact="one")) for _ in range(2)]
    gone.cancel()
    await asyncio.wait([gone])
    update(policy, "one")
    new_versions.notify()
    await there
