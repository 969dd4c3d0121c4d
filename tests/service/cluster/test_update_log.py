"""What an engine that starts late has to do, against having done all of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from shopr1_client.wire_policy import AdapterRequest, UpdateRequest
from shopr1_service.cluster.update_log import Change, Entry, History, Unloading
from shopr1_service.core import Version
from shopr1_service.policy.versions import VersionTable
from shopr1_service.weights.tensors import UpdateContents

TENSORS = ("a", "b", "c", "d")
MAX_KEPT = 2

Step = tuple[str, frozenset[str]]
"""What is done, and to which tensors; or which adapter, in front."""
names = st.frozensets(st.sampled_from(TENSORS), min_size=1)
steps = st.lists(
    st.tuples(st.sampled_from(["whole", "part", "load x", "load y", "unload x", "unload y"]), names),
    max_size=12,
)


@dataclass
class Model:
    """Which change each tensor comes from, and which versions of adapters are loaded."""

    tensors: dict[str, int] = field(default_factory=dict)
    adapters: set[int] = field(default_factory=set)

    def make(self, entry: Entry) -> None:
        if isinstance(entry.change.request, UpdateRequest):
            assert entry.taken is not None
            self.tensors |= dict.fromkeys(entry.taken.names, entry.number)
            self.adapters.clear()
        elif isinstance(entry.change.request, AdapterRequest):
            self.adapters.add(entry.number)

    def agree(self, table: VersionTable) -> None:
        self.adapters &= {version.number for version in table.loaded()}


def after(history: History, step: Step) -> History:
    what, tensors = step
    table, number = history.table, history.number + 1
    if what in ("whole", "part"):
        names = frozenset(TENSORS) if what == "whole" else tensors
        request = UpdateRequest(path="-", version=str(number), partial=what == "part")
        new = table.with_base(str(number), 0.0)
        return history.after(Change(request, f"u{number}"), new, UpdateContents(names, frozenset()))
    verb, adapter = what.split()
    if verb == "load":
        new = table.with_adapter(Version(str(number), number, adapter), max_kept=MAX_KEPT, is_default=False)
        return history.after(Change(AdapterRequest(name=adapter, path="-"), f"u{number}"), new)
    return history.after(Change(Unloading(adapter, None)), table.without(table.adapters.get(adapter, ())))


def histories(taken: Sequence[Step]) -> list[History]:
    """After each step, and before all of them."""
    all_of = [History(VersionTable.starting_with(Version("0")))]
    for step in taken:
        all_of.append(after(all_of[-1], step))
    return all_of


@given(steps, st.integers(0, 12))
def test_late_engines_end_where_the_others_are(taken: list[Step], num_made: int) -> None:
    """One that makes each change in turn, one that starts now, and one that stopped in the middle."""
    all_of = histories(taken)
    always, stopped, late = Model(), Model(), Model()
    for index, history in enumerate(all_of[1:], start=1):
        for model in (always, stopped) if index <= num_made else (always,):
            for entry in history.missing(history.number - 1):
                model.make(entry)
            model.agree(history.table)
    last = all_of[-1]
    for entry in last.entries:
        late.make(entry)
    late.agree(last.table)
    for entry in last.missing(all_of[min(num_made, len(taken))].number):
        stopped.make(entry)
    stopped.agree(last.table)
    assert late == always
    assert stopped == always


@given(steps)
def test_nothing_is_kept_that_is_not_needed(taken: list[Step]) -> None:
    """Without any of its entries, an engine would end elsewhere."""
    last = histories(taken)[-1]

    def end(entries: Sequence[Entry]) -> Model:
        model = Model()
        for entry in entries:
            model.make(entry)
        model.agree(last.table)
        return model

    whole = end(last.entries)
    for entry in last.entries:
        assert end([other for other in last.entries if other is not entry]) != whole
    assert last.uploads == {f"u{entry.number}" for entry in last.entries}


def test_whole_weights_cover_all_that_was_before() -> None:
    some: list[Step] = [("whole", frozenset()), ("part", frozenset("ab")), ("load x", frozenset())]
    last = histories([*some, ("whole", frozenset())])[-1]
    assert [entry.number for entry in last.entries] == [4]
