"""Loaded versions of the policy, and the one that each request gets.

A version is a state of the weights, or of a LoRA adapter on them. The client gives it a name; its number
counts every change since the service started, so that the later of two versions has the higher number, even
if they have the same name.

Tables are immutable. The engine's thread replaces the current one between two batches; any thread may read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shopr1_client.errors import InvalidRequestError, PolicyVersionError
from shopr1_client.wire_policy import BASE, VersionDemand
from shopr1_service.core import Target, Version

RETRY_AFTER_S = 1.0
"""For a request that demands a version that is not loaded yet."""
_MAX_NAMES = 10_000
"""Names that are remembered, also of versions that are no longer loaded."""


@dataclass(frozen=True)
class VersionTable:
    """Loaded versions.

    Attributes:
        base: version of the policy's own weights.
        adapters: versions by the adapter's name, the newest last; no empty ones.
        num_changes: since the start; loading and unloading.
    """

    base: Version
    adapters: Mapping[str, tuple[Version, ...]] = field(default_factory=dict)
    default_adapter: str | None = None
    num_changes: int = 0
    _numbers: Mapping[tuple[str | None, str], int] = field(default_factory=dict)

    @classmethod
    def starting_with(cls, base: Version) -> "VersionTable":
        return cls(base, _numbers={(None, base.name): base.number})

    @property
    def current(self) -> Version:
        """Version for a request that names none."""
        return self.find(Target())

    def find(self, target: Target) -> Version:
        """Newest version that a request allows.

        Raises:
            InvalidRequestError: no such adapter is loaded.
            PolicyVersionError: no such version is loaded; with `retry_after_s` if it may still be.
        """
        versions = self._versions_of(target.adapter)
        demand = target.demand
        if demand is None:
            return versions[-1]
        key = demand.exact if demand.exact is not None else demand.at_least
        number = self._number(versions, key) if isinstance(key, str) else key
        for version in reversed(versions):
            is_newer = demand.at_least is not None and number is not None and version.number >= number
            if is_newer or version.number == number:
                return version
        raise _missing(demand, number, versions[-1])

    def with_base(self, name: str, loaded_at_s: float) -> "VersionTable":
        """Table with new base weights; adapters belong to the old ones and are unloaded."""
        base = Version(name, self.num_changes + 1, None, loaded_at_s)
        return replace(self._after(base), base=base, adapters={}, default_adapter=None)

    def with_adapter(self, version: Version, *, max_kept: int, is_default: bool) -> "VersionTable":
        """Table with a further version of an adapter, of which the last `max_kept` stay loaded."""
        assert version.adapter is not None
        kept = (*self.adapters.get(version.adapter, ()), version)[-max_kept:]
        default = version.adapter if is_default else self.default_adapter
        adapters = {**self.adapters, version.adapter: kept}
        return replace(self._after(version), adapters=adapters, default_adapter=default)

    def without(self, gone: Iterable[Version]) -> "VersionTable":
        """Table without these versions of adapters."""
        numbers = {version.number for version in gone}
        kept = {
            name: tuple(version for version in versions if version.number not in numbers)
            for name, versions in self.adapters.items()
        }
        adapters = {name: versions for name, versions in kept.items() if versions}
        default = self.default_adapter if self.default_adapter in adapters else None
        return replace(self, adapters=adapters, default_adapter=default, num_changes=self.num_changes + 1)

    def with_next_number(self, number: int) -> "VersionTable":
        """Table whose next change gets this number."""
        return replace(self, num_changes=number - 1)

    def loaded(self) -> list[Version]:
        """Versions of all adapters, by name, the newest of each last."""
        return [version for _, versions in sorted(self.adapters.items()) for version in versions]

    def _versions_of(self, adapter: str | None) -> tuple[Version, ...]:
        name = adapter or self.default_adapter
        if name is None or name == BASE:
            return (self.base,)
        if name not in self.adapters:
            known = ", ".join([BASE, *sorted(self.adapters)])
            message = f"no adapter {name!r} is loaded; there are: {known}"
            raise InvalidRequestError(message, errors=[{"location": "adapter", "message": message}])
        return self.adapters[name]

    def _number(self, versions: Sequence[Version], name: str) -> int | None:
        """Number of the last version with this name; loaded ones are never forgotten."""
        loaded = [version.number for version in versions if version.name == name]
        return loaded[-1] if loaded else self._numbers.get((versions[-1].adapter, name))

    def _after(self, version: Version) -> "VersionTable":
        numbers = {**self._numbers, (version.adapter, version.name): version.number}
        if len(numbers) > _MAX_NAMES:
            del numbers[next(iter(numbers))]
        return replace(self, num_changes=version.number, _numbers=numbers)


def _missing(demand: VersionDemand, number: int | None, newest: Version) -> PolicyVersionError:
    """An exact version that was replaced will not come back; an unknown one may be loaded later."""
    key, what = (demand.exact, "") if demand.exact is not None else (demand.at_least, " or a later one")
    is_past = number is not None and number <= newest.number
    return PolicyVersionError(
        f"version {key!r}{what} is demanded, {newest.name!r} is loaded, number {newest.number}",
        retry_after_s=None if is_past else RETRY_AFTER_S,
    )
