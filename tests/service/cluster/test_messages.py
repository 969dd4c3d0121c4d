"""Messages between processes: which engines have a version, and how problems travel."""

import pickle

import pytest

from shopr1_client.errors import NotReadyError
from shopr1_client.wire_policy import VersionDemand
from shopr1_service.cluster.messages import BehindError, ClusterView, raise_problem, returns_problems
from shopr1_service.core import Target, Version
from shopr1_service.policy.versions import VersionTable

OLD = VersionTable.starting_with(Version("0"))
NEW = OLD.with_base("x", 0.0)


def test_engines_with_a_version_are_found_while_engines_differ() -> None:
    view = ClusterView(1, NEW, 0, {0: OLD, 1: NEW}, {"a": 1, "b": 0, "c": 7})  # no table for `c`
    assert view.engines_with(Target()) == frozenset("ab")
    assert view.engines_with(Target(demand=VersionDemand(exact="0"))) == frozenset("b")
    assert view.engines_with(Target(demand=VersionDemand(at_least=1))) == frozenset("a")
    assert view.engines_with(Target(adapter="unknown")) == frozenset()


@pytest.mark.anyio
async def test_a_problem_is_returned_by_one_process_and_raised_by_another() -> None:
    @returns_problems
    async def compute(number: int) -> int:
        if not number:
            raise NotReadyError("busy", retry_after_s=2.0)
        return 6 // (number - 1)

    assert raise_problem(await compute(3)) == 3
    sent = pickle.loads(pickle.dumps(await compute(0)))
    with pytest.raises(NotReadyError, match="busy") as caught:
        raise_problem(sent)
    assert caught.value.retry_after_s == 2.0
    with pytest.raises(ZeroDivisionError):  # a bug is raised where it is
        await compute(1)


def test_the_order_to_restart_keeps_its_reason() -> None:
    sent = pickle.loads(pickle.dumps(BehindError("it has another change")))
    assert (type(sent), str(sent)) == (BehindError, "it has another change")
