"""The log of changes: a late engine that applies it ends like one that applied every change."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from shopr1_client.wire_policy import AdapterRequest, UpdateRequest
from shopr1_service.cluster.update_log import Change, Entry, UnloadRequest, UpdateLog
from shopr1_service.core import Version
from shopr1_service.policy.versions import VersionTable
from shopr1_service.weights.tensors import UpdateContents

TENSORS = ("a", "b", "c", "d")
MAX_KEPT = 2

Step = tuple[str, frozenset[str]]
"""A kind of change (with the adapter's name), and the tensors that it replaces."""
names = st.frozensets(st.sampled_from(TENSORS), min_size=1)
steps = st.lists(
    st.tuples(st.sampled_from(["whole", "part", "load x", "load y", "unload x", "unload y"]), names),
    max_size=12,
)


@dataclass
class Model:
    """State of an engine: the change that each tensor comes from, and the loaded versions of adapters."""

    tensors: dict[str, int] = field(default_factory=dict)
    adapters: set[int] = field(default_factory=set)

    def apply(self, entry: Entry) -> None:
        if isinstance(entry.change.request, UpdateRequest):
            assert entry.taken is not None
            self.tensors |= dict.fromkeys(entry.taken.names, entry.number)
            self.adapters.clear()
        elif isinstance(entry.change.request, AdapterRequest):
            self.adapters.add(entry.number)

    def agree(self, table: VersionTable) -> None:
        self.adapters &= {version.number for version in table.loaded()}


def next_log(log: UpdateLog, step: Step) -> UpdateLog:
    what, tensors = step
    table, number = log.table, log.number + 1
    if what in ("whole", "part"):
        names = frozenset(TENSORS) if what == "whole" else tensors
        request = UpdateRequest(path="-", version=str(number), partial=what == "part")
        new = table.with_base(str(number), 0.0)
        return log.append(Change(request, f"u{number}"), new, UpdateContents(names, frozenset()))
    verb, adapter = what.split()
    if verb == "load":
        new = table.with_adapter(Version(str(number), number, adapter), max_kept=MAX_KEPT, is_default=False)
        return log.append(Change(AdapterRequest(name=adapter, path="-"), f"u{number}"), new)
    return log.append(Change(UnloadRequest(adapter, None)), table.without(table.adapters.get(adapter, ())))


def all_logs(taken: Sequence[Step]) -> list[UpdateLog]:
    """The log before all steps, and after each."""
    all_of = [UpdateLog(VersionTable.starting_with(Version("0")))]
    for step in taken:
        all_of.append(next_log(all_of[-1], step))
    return all_of


@given(steps, st.integers(0, 12))
def test_late_engines_end_in_the_same_state(taken: list[Step], num_applied: int) -> None:
    """One applies each change in turn, one starts now, and one missed the last changes."""
    all_of = all_logs(taken)
    always, stopped, late = Model(), Model(), Model()
    for index, log in enumerate(all_of[1:], start=1):
        for model in (always, stopped) if index <= num_applied else (always,):
            for entry in log.after(log.number - 1):
                model.apply(entry)
            model.agree(log.table)
    last = all_of[-1]
    for entry in last.entries:
        late.apply(entry)
    late.agree(last.table)
    for entry in last.after(all_of[min(num_applied, len(taken))].number):
        stopped.apply(entry)
    stopped.agree(last.table)
    assert late == always
    assert stopped == always


@given(steps)
def test_every_entry_is_needed(taken: list[Step]) -> None:
    """Without any one of its entries, an engine would end in another state."""
    last = all_logs(taken)[-1]

    def end(entries: Sequence[Entry]) -> Model:
        model = Model()
        for entry in entries:
            model.apply(entry)
        model.agree(last.table)
        return model

    whole = end(last.entries)
    for entry in last.entries:
        assert end([other for other in last.entries if other is not entry]) != whole
    assert last.uploads == {f"u{entry.number}" for entry in last.entries}


def test_whole_weights_replace_everything_before() -> None:
    some: list[Step] = [("whole", frozenset()), ("part", frozenset("ab")), ("load x", frozenset())]
    last = all_logs([*some, ("whole", frozenset())])[-1]
    assert [entry.number for entry in last.entries] == [4]
