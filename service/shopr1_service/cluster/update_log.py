"""Log of the policy's changes, reduced to those that a new engine has to apply.

Every engine starts with the same weights. Applied in order, the entries of the log give it the weights and
adapters of the others. Entries that later ones have undone are dropped: weights whose tensors have all been
replaced, and adapters that are no longer loaded.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from shopr1_client.wire_policy import AdapterRequest, UpdateRequest
from shopr1_service.policy.versions import VersionTable
from shopr1_service.weights.tensors import UpdateContents


@dataclass(frozen=True)
class UnloadRequest:
    """Request to unload an adapter, or one version of it."""

    name: str
    version: str | None = None


@dataclass(frozen=True)
class Change:
    """A change of the policy.

    Attributes:
        request: its `path` counts only if `upload` is None.
        upload: id of bytes in the coordinator's `UploadStore`.
        config: text of the `adapter_config.json` that belongs to an uploaded adapter.
    """

    request: UpdateRequest | AdapterRequest | UnloadRequest
    upload: str | None = None
    config: bytes | None = None


@dataclass(frozen=True)
class Entry:
    """A change that was applied, and the number of the version that it made."""

    number: int
    change: Change
    taken: UpdateContents | None = None


@dataclass(frozen=True)
class UpdateLog:
    """The entries that are still needed, and the version table after all of them.

    Attributes:
        start: digest of the weights that the first engine started with.
    """

    table: VersionTable
    entries: tuple[Entry, ...] = ()
    start: str = ""

    @property
    def number(self) -> int:
        """Number of the last change."""
        return self.table.num_changes

    @property
    def replaced(self) -> frozenset[str]:
        """Names of the tensors that are no longer those of the start."""
        return frozenset(name for entry in self.entries if entry.taken for name in entry.taken.names)

    @property
    def uploads(self) -> frozenset[str]:
        """Ids of the uploads that are still needed."""
        return frozenset(entry.change.upload for entry in self.entries if entry.change.upload)

    def append(self, change: Change, table: VersionTable, taken: UpdateContents | None = None) -> "UpdateLog":
        """A new log with a further change.

        Args:
            table: version table of the engine that has applied it.
        """
        entries = (*self.entries, Entry(table.num_changes, change, taken))
        return UpdateLog(table, tuple(_needed(entries, table))[::-1], self.start)

    def after(self, number: int) -> tuple[Entry, ...]:
        """Entries that an engine whose last change is `number` must still apply."""
        return tuple(entry for entry in self.entries if entry.number > number)


def _needed(entries: tuple[Entry, ...], table: VersionTable) -> Iterator[Entry]:
    """The entries whose effect no later one has undone, last one first."""
    adapters = {version.number for version in table.loaded()}
    replaced: set[str] = set()
    is_whole = False
    for entry in reversed(entries):
        if not isinstance(entry.change.request, UpdateRequest):
            if entry.number in adapters:
                yield entry
            continue
        names = entry.taken.names if entry.taken else frozenset()
        if is_whole or names <= replaced:
            continue
        replaced |= names
        is_whole = not entry.change.request.partial
        yield entry
