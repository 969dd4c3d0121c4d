"""The version of a request, compared with a list of all versions that were ever loaded."""

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shopr1_client.errors import InvalidRequestError, PolicyVersionError
from shopr1_client.wire_policy import VersionDemand
from shopr1_service.core import Target, Version
from shopr1_service.policy import versions
from shopr1_service.policy.versions import VersionTable

START = VersionTable.starting_with(Version("start", loaded_at_s=1.0))
MAX_KEPT = 2


def exact(key: str | int) -> VersionDemand:
    return VersionDemand(exact=key)


def at_least(key: str | int) -> VersionDemand:
    return VersionDemand(at_least=key)


def with_adapter(
    table: VersionTable, name: str, version: str, *, max_kept: int = MAX_KEPT, is_default: bool = False
) -> VersionTable:
    added = Version(version, table.num_changes + 1, name, 2.0)
    return table.with_adapter(added, max_kept=max_kept, is_default=is_default)


def number(table: VersionTable, adapter: str | None = None, demand: VersionDemand | None = None) -> int:
    return table.find(Target(adapter, demand)).number


def refusal(table: VersionTable, demand: VersionDemand, adapter: str | None = None) -> PolicyVersionError:
    with pytest.raises(PolicyVersionError) as caught:
        table.find(Target(adapter, demand))
    return caught.value


# --- weights ----------------------------------------------------------------------------------------


def test_the_start_is_number_0() -> None:
    assert (START.current, START.base, START.num_changes) == (Version("start", 0, None, 1.0),) * 2 + (0,)
    assert START.current.info.model_dump() == {
        "version": "start",
        "number": 0,
        "adapter": None,
        "loaded_at": 1.0,
    }
    for demand in (None, exact("start"), exact(0), at_least("start"), at_least(0)):
        assert number(START, demand=demand) == 0


def test_an_update_leaves_the_former_table_as_it_was() -> None:
    table = START.with_base("one", 3.0)
    assert table.current == Version("one", 1, None, 3.0)
    assert START.current.name == "start"
    assert number(table, demand=at_least("start")) == number(table, demand=exact("one")) == 1


@pytest.mark.parametrize("demand", [exact("start"), exact(0)])
def test_replaced_versions_do_not_return(demand: VersionDemand) -> None:
    error = refusal(START.with_base("one", 3.0), demand)
    assert error.retry_after_s is None
    assert error.detail.endswith("is demanded, 'one' is loaded, number 1")


@pytest.mark.parametrize("demand", [exact("two"), exact(2), at_least("two"), at_least(2)])
def test_unknown_versions_may_be_loaded_later(demand: VersionDemand) -> None:
    table = START.with_base("one", 3.0)
    assert refusal(table, demand).retry_after_s == versions.RETRY_AFTER_S
    assert number(table.with_base("two", 4.0), demand=demand) == 2


def test_a_name_that_is_given_again_means_the_last() -> None:
    table = START.with_base("one", 3.0).with_base("start", 4.0)
    assert number(table, demand=exact("start")) == number(table, demand=at_least("start")) == 2
    assert refusal(table, exact(0)).retry_after_s is None
    later = table.with_base("two", 5.0)
    assert refusal(later, exact("start")).retry_after_s is None
    assert number(later, demand=at_least("start")) == 3


def test_a_name_that_looks_like_a_number_is_a_name() -> None:
    table = START.with_base("7", 3.0)
    assert number(table, demand=exact("7")) == 1
    assert refusal(table, exact("1")).retry_after_s is not None


def test_old_names_are_forgotten_and_loaded_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_MAX_NAMES", 3)
    table = with_adapter(START, "a", "kept", max_kept=100)
    for i in range(5):
        table = with_adapter(table, "a", f"{i}", max_kept=100)
    assert len(table._numbers) == 3
    assert number(table, demand=exact("start")) == 0
    assert number(table, "a", exact("kept")) == 1
    table = table.without(version for version in table.loaded() if version.name in ("kept", "4"))
    # Forgotten: nobody knows any more that it was there.
    assert refusal(table, exact("kept"), "a").retry_after_s is not None
    # Remembered, because it came late. But what is newer has gone too, so it counts as not yet there.
    assert number(table, "a", at_least("3")) == 5


# --- adapters ---------------------------------------------------------------------------------------


def test_an_adapter_is_found_by_name() -> None:
    table = with_adapter(with_adapter(START, "a", "x"), "b", "y")
    assert [number(table, name) for name in (None, "base", "a", "b")] == [0, 0, 1, 2]
    assert table.default_adapter is None
    for demand in (exact("x"), exact(1), at_least("x"), at_least(1)):
        assert number(table, "a", demand) == 1
        # Neither names nor numbers of one are another's.
        assert isinstance(refusal(table, demand, "base"), PolicyVersionError)
    assert number(table, "b", at_least(1)) == 2


@pytest.mark.parametrize("demand", [None, exact(0)])
def test_an_unknown_adapter(demand: VersionDemand | None) -> None:
    table = with_adapter(with_adapter(START, "b", "y"), "a", "x")
    with pytest.raises(InvalidRequestError) as caught:
        table.find(Target("c", demand))
    message = "no adapter 'c' is loaded; there are: base, a, b"
    assert caught.value.errors == [{"location": "adapter", "message": message}]


def test_the_default_adapter_scores_requests_without_one() -> None:
    table = with_adapter(with_adapter(START, "a", "x", is_default=True), "b", "y")
    assert (table.current.adapter, number(table), number(table, "base"), number(table, "b")) == ("a", 1, 0, 2)
    assert number(table, demand=exact("x")) == 1
    assert number(with_adapter(table, "a", "z")) == 3
    assert number(with_adapter(table, "b", "z", is_default=True)) == 3


def test_the_last_versions_stay() -> None:
    table = START
    for name in "xyz":
        table = with_adapter(table, "a", name)
    assert [version.name for version in table.loaded()] == ["y", "z"]
    assert [number(table, "a", demand) for demand in (None, exact("y"), exact("z"), at_least("x"))] == [
        *(3, 2, 3, 3)
    ]
    assert refusal(table, exact("x"), "a").retry_after_s is None


def test_an_update_of_the_weights_takes_all_adapters_with_it() -> None:
    table = with_adapter(START, "a", "x", is_default=True).with_base("one", 3.0)
    assert (table.loaded(), table.default_adapter, table.current.number) == ([], None, 2)
    with pytest.raises(InvalidRequestError):
        table.find(Target("a"))
    again = with_adapter(table, "a", "y")
    assert refusal(again, exact("x"), "a").retry_after_s is None
    assert number(again, "a", at_least("x")) == 3


def test_unloading_counts_as_a_change() -> None:
    table = with_adapter(with_adapter(START, "a", "x", is_default=True), "a", "y")
    [first, second] = table.loaded()
    without_first = table.without([first])
    assert (without_first.loaded(), without_first.default_adapter) == ([second], "a")
    without_both = without_first.without([second])
    assert (without_both.loaded(), without_both.default_adapter) == ([], None)
    assert without_both.num_changes == 4
    assert without_both.current == START.base
    assert number(with_adapter(without_both, "a", "z"), "a") == 5


# --- anything in any order --------------------------------------------------------------------------


@dataclass
class Model:
    """A list of all versions; loaded ones are computed from it each time."""

    came: list[Version] = field(default_factory=lambda: [START.base])
    gone: set[int] = field(default_factory=set)
    num_changes: int = 0

    def loaded(self, adapter: str | None) -> list[Version]:
        base = max(version.number for version in self.came if version.adapter is None)
        of_it = [version for version in self.came if version.adapter == adapter]
        if adapter is None:
            return of_it[-1:]
        kept: list[Version] = []
        for version in (version for version in of_it if version.number > base):
            kept = [old for old in kept if self._was_there(old, version)][-(MAX_KEPT - 1) :]
            kept.append(version)
        return [version for version in kept if version.number not in self.gone]

    def _was_there(self, old: Version, new: Version) -> bool:
        return self.unloaded_at.get(old.number, new.number) >= new.number

    unloaded_at: dict[int, int] = field(default_factory=dict)


CHANGES = st.lists(
    st.tuples(st.sampled_from(["base", "a", "b", "unload a", "unload b"]), st.sampled_from("xyz")),
    max_size=10,
)


@given(changes=CHANGES)
def test_every_demand_after_any_changes(changes: list[tuple[str, str]]) -> None:
    table, model = START, Model()
    for what, name in changes:
        if what == "base":
            table = table.with_base(name, 0.0)
            model.came.append(table.base)
        elif what.startswith("unload"):
            gone = model.loaded(what[-1])[:1]
            table = table.without(gone)
            model.gone.update(version.number for version in gone)
            model.unloaded_at.update((version.number, table.num_changes) for version in gone)
        else:
            table = with_adapter(table, what, name)
            model.came.append(table.adapters[what][-1])
        assert [version.number for version in model.came] == sorted({v.number for v in model.came})
    for adapter in (None, "a", "b"):
        check(table, model, adapter)


def check(table: VersionTable, model: Model, adapter: str | None) -> None:
    loaded = model.loaded(adapter)
    if not loaded:
        with pytest.raises(InvalidRequestError):
            table.find(Target(adapter))
        return
    assert table.find(Target(adapter)) == loaded[-1]
    keys: list[str | int] = [*"xyzw", "start", *range(table.num_changes + 2)]
    for key, is_exact in itertools.product(keys, [True, False]):
        wanted = key if isinstance(key, int) else last_named(model, adapter, key)
        fitting = [v for v in loaded if wanted is not None and fits(v.number, wanted, is_exact=is_exact)]
        demand = exact(key) if is_exact else at_least(key)
        if fitting:
            assert table.find(Target(adapter, demand)) == fitting[-1]
        else:
            is_past = wanted is not None and wanted <= loaded[-1].number
            assert (refusal(table, demand, adapter).retry_after_s is None) == is_past


def fits(number: int, wanted: int, *, is_exact: bool) -> bool:
    return number == wanted if is_exact else number >= wanted


def last_named(model: Model, adapter: str | None, name: str) -> int | None:
    numbers = [v.number for v in model.came if (v.adapter, v.name) == (adapter, name)]
    return numbers[-1] if numbers else None
