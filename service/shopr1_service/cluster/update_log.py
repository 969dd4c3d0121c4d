"""The policy's changes, as far as an engine that starts now has to make them.

Every engine starts with the same weights. The changes since then, in order, bring it to where the others
are. Those that later ones have undone are left out: weights whose tensors have all been replaced, and
adapters that are not loaded any more. Numbers and names come from the first engine that made a change, in
its table.
"""

from dataclasses import dataclass

from shopr1_client.wire_policy import AdapterRequest, UpdateRequest
from shopr1_service.policy.versions import VersionTable
from shopr1_service.weights.tensors import UpdateContents


@dataclass(frozen=True)
class Unloading:
    """Of an adapter, or of one version of it."""

    name: str
    version: str | None


@dataclass(frozen=True)
class Change:
    """What is to be done.

    Attributes:
        request: its path means something only if there is no upload.
        upload: id of bytes that the journal keeps.
        config: of an adapter, beside its upload.
    """

    request: UpdateRequest | AdapterRequest | Unloading
    upload: str | None = None
    config: bytes | None = None


@dataclass(frozen=True)
class Entry:
    """A change that was made.

    Attributes:
        number: of the version that it made.
        taken: of the policy's own weights.
    """

    number: int
    change: Change
    taken: UpdateContents | None = None


@dataclass(frozen=True)
class History:
    """See the module.

    Attributes:
        table: after all of them.
    """

    table: VersionTable
    entries: tuple[Entry, ...] = ()

    @property
    def number(self) -> int:
        """Of the last change."""
        return self.table.num_changes

    @property
    def uploads(self) -> frozenset[str]:
        """Ids of those that are still needed."""
        return frozenset(entry.change.upload for entry in self.entries if entry.change.upload)

    def after(self, change: Change, table: VersionTable, taken: UpdateContents | None = None) -> "History":
        """With a further change.

        Args:
            table: of the engine that has made it.
        """
        entry = Entry(table.num_changes, change, taken)
        return History(table, _needed((*self.entries, entry), table))

    def missing(self, number: int) -> tuple[Entry, ...]:
        """What an engine has still to do whose last change has this number."""
        return tuple(entry for entry in self.entries if entry.number > number)


def _needed(entries: tuple[Entry, ...], table: VersionTable) -> tuple[Entry, ...]:
    """From the end: what comes later covers what was before."""
    adapters = {version.number for version in table.loaded()}
    covered: set[str] = set()
    kept: list[Entry] = []
    is_whole = False
    for entry in reversed(entries):
        if isinstance(entry.change.request, UpdateRequest):
            names = entry.taken.names if entry.taken else frozenset()
            if is_whole or names <= covered:
                continue
            covered |= names
            is_whole = not entry.change.request.partial
            kept.append(entry)
        elif entry.number in adapters:
            kept.append(entry)
    return tuple(reversed(kept))
