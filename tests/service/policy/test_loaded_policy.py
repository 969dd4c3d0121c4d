"""Versions of the policy in this process; updates through HTTP are tested in tests/service/updates."""

import copy
import dataclasses
from collections.abc import Iterator

import pytest

from shopr1_service.core import Certainty, CompletionTokens, PromptKey, TokenGroup, Version
from shopr1_service.memory.budget import Account, MemoryBudget
from shopr1_service.policy.adapters.lora import build_adapter, parse_config
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.policy.versions import VersionTable
from tests.support.adapters import random_tensors
from tests.support.broken_updates import ADAPTER_CONFIG
from tests.support.models import Reference, one_thread, policy_of, random_ids, rules, tiny_model
from tests.support.staging import staged
from tests.support.updating import HEAD, NORM, changed_model, weights_of


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


MEMORY = MemoryBudget()


@pytest.fixture
def policy() -> LoadedPolicy:
    return policy_of(tiny_model())


def add_adapter(policy: LoadedPolicy, name: str, *, is_default: bool = False) -> Version:
    number = policy.versions.num_changes + 1
    version = Version(f"v{number}", number, name, 0.0)
    adapter = build_adapter(policy.model, parse_config(ADAPTER_CONFIG), random_tensors(policy.model))
    with MEMORY.hold(Account.ADAPTERS, adapter.num_bytes) as memory:
        gone = policy.add_adapter(adapter, version, max_kept=2, is_default=is_default, memory=memory)
    assert gone == []
    return version


def test_info_names_the_current_version(policy: LoadedPolicy) -> None:
    assert (policy.info.version, policy.info.number) == ("0", 0)
    add_adapter(policy, "a")
    assert policy.info.number == 0
    add_adapter(policy, "b", is_default=True)
    assert (policy.info.version, policy.info.number) == ("v2", 2)


def test_new_weights_unload_all_adapters(policy: LoadedPolicy) -> None:
    add_adapter(policy, "a")
    policy.backup.save(list(policy.weights.tensors))
    new = {NORM: weights_of(changed_model())[NORM]}
    version = policy.replace_weights(staged(policy.model, *new.items()), "new")
    assert (version.name, version.number, policy.versions.loaded()) == ("new", 2, [])
    assert policy.weights.tensors[NORM].equal(new[NORM])


def test_weights_that_the_model_would_rescale_once_count_as_sent() -> None:
    """RWKV divides weights by powers of two in its first pass, and would not divide an update's."""
    model = tiny_model(
        "rwkv", attention_hidden_size=32, context_length=512, num_hidden_layers=4, rescale_every=1
    )
    sent = weights_of(copy.deepcopy(model))
    # The division changes numbers by up to 2e-4 here, because norms add their epsilon to smaller variances.
    undivided = copy.deepcopy(model)
    undivided.config.rescale_every = 0
    reference, policy = Reference(undivided), policy_of(model)
    prompt_ids, ids = random_ids(12, seed=1), random_ids(5, seed=2)
    expected = reference.values(prompt_ids, ids, range(5), rules())

    def check() -> None:
        group = TokenGroup(PromptKey(prompt_ids), [CompletionTokens(ids, range(5))])
        [[certainty]] = policy.certainties([group], rules())
        assert isinstance(certainty, Certainty)
        assert certainty.values == pytest.approx(expected, rel=0, abs=1e-4)

    check()
    policy.backup.save(list(policy.weights.tensors))
    policy.replace_weights(staged(policy.model, *sent.items()), "the same")
    check()


def test_the_next_change_gets_the_number_that_was_set(policy: LoadedPolicy) -> None:
    policy.set_next_number(7)
    policy.backup.save([HEAD])
    assert (
        policy.replace_weights(staged(policy.model, (HEAD, weights_of(policy.model)[HEAD])), "x").number == 7
    )


def test_versions_of_another_engine(policy: LoadedPolicy) -> None:
    kept, dropped = add_adapter(policy, "a"), add_adapter(policy, "b")
    table = policy.versions.without([dropped])
    policy.sync_versions(table)
    assert policy.versions is table
    assert policy._adapters.keys() == {kept.number}


def test_unloading_empties_the_prefix_cache_after_a_sync_with_an_engine_that_loaded_at_another_time(
    policy: LoadedPolicy,
) -> None:
    version = add_adapter(policy, "a")
    elsewhere = dataclasses.replace(version, loaded_at_s=9.0)
    assert policy._cache.stats.num_bytes > 0  # of the probe
    policy.sync_versions(dataclasses.replace(policy.versions, adapters={"a": (elsewhere,)}))
    policy.remove_adapters([elsewhere])
    assert policy._cache.stats.num_bytes == 0


def test_versions_that_are_not_loaded_here(policy: LoadedPolicy) -> None:
    version = add_adapter(policy, "a")
    other_base = VersionTable.starting_with(dataclasses.replace(policy.versions.base, number=9))
    unknown = policy.versions.with_adapter(
        dataclasses.replace(version, number=2), max_kept=2, is_default=False
    )
    for table in (other_base, unknown):
        with pytest.raises(ValueError, match="its versions are"):
            policy.sync_versions(table)
    assert policy.versions.loaded() == [version]


def test_the_memory_of_adapters_is_held_until_they_are_unloaded(policy: LoadedPolicy) -> None:
    before = MEMORY.num_bytes(Account.ADAPTERS)
    first, second = add_adapter(policy, "a"), add_adapter(policy, "b")
    own = (MEMORY.num_bytes(Account.ADAPTERS) - before) // 2
    assert own > 0
    policy.remove_adapters([first])
    policy.remove_adapters([first])  # it has gone already
    assert MEMORY.num_bytes(Account.ADAPTERS) - before == own
    policy.remove_adapters([second])
    assert MEMORY.num_bytes(Account.ADAPTERS) == before
