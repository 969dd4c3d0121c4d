"""A language model in this process, whose weights and adapters change between two batches.

Changes run on the engine's thread (`Scheduler.between_batches`); their preparation may run beside it.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from transformers import PreTrainedModel

from shopr1_client.errors import InvalidWeightsError
from shopr1_client.wire import PolicyInfo, Reason
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Certainty, EngineStats, FatalEngineError, TokenGroup, Unmeasurable, Version
from shopr1_service.engine.engine import Engine
from shopr1_service.engine.heartbeat import Heartbeat
from shopr1_service.engine.prefix_cache import PrefixCache
from shopr1_service.field_errors import field_problem
from shopr1_service.memory.budget import Hold
from shopr1_service.policy.adapters.lora import Adapter, unused_layers
from shopr1_service.policy.prompts.tokenizer import PolicyTokenizer
from shopr1_service.policy.versions import VersionTable
from shopr1_service.weights.rollback import WeightBackup
from shopr1_service.weights.tensors import TensorLocation, Weights

logger = logging.getLogger(__name__)

BatchCertainties = Sequence[Sequence[Certainty | Unmeasurable]]


class LoadedPolicy:
    """A model with its tokenizer, engine, prefix cache and loaded versions.

    Args:
        info: with the version that is loaded at the start.
        renew: drops everything that was computed with the old weights.
        probe: scores a few random tokens, as a check.
        staging_dir: directory of the backup of weights.
        ignored_tensors: patterns of tensors that updates may have beside the model's.
    """

    def __init__(
        self,
        info: PolicyInfo,
        codec: PolicyTokenizer,
        engine: Engine,
        heartbeat: Heartbeat,
        model: PreTrainedModel,
        cache: PrefixCache,
        *,
        renew: Callable[[], None],
        probe: Callable[[Version | None], BatchCertainties],
        staging_dir: Path | None = None,
        ignored_tensors: Sequence[str] = (),
    ) -> None:
        self.heartbeat = heartbeat
        self.codec = codec
        self.versions = VersionTable.starting_with(Version(info.version, loaded_at_s=time.time()))
        self.model = model
        self.weights = Weights(model, ignored_tensors)
        self.backup = WeightBackup(self.weights, staging_dir)
        self._info = info
        self.engine = engine
        self._cache = cache
        self._renew = renew
        self._probe = probe
        self._adapters: dict[int, Adapter] = {}  # by the number of the version
        self._adapter_memory: dict[int, Hold] = {}  # the same

    @property
    def info(self) -> PolicyInfo:
        current = self.versions.current
        return self._info.model_copy(update={"version": current.name, "number": current.number})

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> BatchCertainties:
        version = version or self.versions.current
        adapter = self._adapters.get(version.number)
        groups = [group.with_weights(version if adapter else None) for group in groups]
        with adapter.applied(self.model) if adapter else nullcontext():
            return self.engine.certainties(groups, rules)

    def replace_weights(self, locations: Mapping[str, TensorLocation], name: str) -> Version:
        """Load new weights, all of them or none. The old ones must be in the backup.

        Raises:
            InvalidWeightsError: the policy cannot compute with them.
            OSError: they cannot be read.
            FatalEngineError: the rollback failed, too.
        """
        try:
            self._load(locations)
            self._renew()
            self._check(self._probe(None))
        except Exception as error:
            logger.error("version %r was refused, rolling back: %s", name, error)
            self._roll_back(locations)
            raise
        self.backup.record(locations)
        self._release(self._adapters.keys())
        self.versions = self.versions.with_base(name, time.time())
        return self.versions.base

    def add_adapter(
        self, adapter: Adapter, version: Version, *, max_kept: int, is_default: bool, memory: Hold
    ) -> list[Version]:
        """Load an adapter; returns its older versions that were unloaded.

        Args:
            memory: the adapter's; shared until it is unloaded.

        Raises:
            InvalidWeightsError: the policy cannot compute with it, or does not call its layers.
        """
        try:
            self._try(adapter, version)
        except Exception:
            self._forget([version])
            raise
        assert version.adapter is not None
        former = self.versions.adapters.get(version.adapter, ())
        self._adapters[version.number] = adapter
        self._adapter_memory[version.number] = memory.shared()
        self.versions = self.versions.with_adapter(version, max_kept=max_kept, is_default=is_default)
        gone = [old for old in former if old not in self.versions.adapters[version.adapter]]
        self._forget(gone)
        return gone

    def remove_adapters(self, gone: Iterable[Version]) -> None:
        """Unload these versions."""
        gone = list(gone)
        self.versions = self.versions.without(gone)
        self._forget(gone)

    def set_next_number(self, number: int) -> None:
        """Number of the next change, whatever was counted here."""
        self.versions = self.versions.with_next_number(number)

    def sync_versions(self, versions: VersionTable) -> None:
        """Take over the table of another engine with the same weights; unload adapters that it lacks.

        Raises:
            ValueError: other weights are loaded here, or an adapter is missing: results would name the wrong
                version.
        """
        kept = {version.number for version in versions.loaded()}
        if versions.base.number != self.versions.base.number or not kept <= self._adapters.keys():
            raise ValueError(f"its versions are {versions}, these {self.versions}")
        self.remove_adapters(version for version in self.versions.loaded() if version.number not in kept)
        self.versions = versions

    def _forget(self, gone: Iterable[Version]) -> None:
        for version in gone:
            self._release([version.number])
            self._cache.forget(version)

    def _release(self, numbers: Iterable[int]) -> None:
        for number in [number for number in numbers if number in self._adapters]:
            del self._adapters[number]
            self._adapter_memory.pop(number).release()

    def _load(self, locations: Mapping[str, TensorLocation]) -> None:
        try:
            self.weights.load(locations, self.heartbeat.beat)
        finally:  # it may be the reason why a file could not be read
            if not all(location.file.is_intact for location in locations.values()):
                raise InvalidWeightsError("the checkpoint was written to while it was loaded")
        if differing := self.weights.differing(locations):
            raise field_problem(
                InvalidWeightsError, differing[0], f"{differing[0]} was written to after it was checked"
            )

    def _roll_back(self, locations: Mapping[str, TensorLocation]) -> None:
        try:
            self.backup.restore(list(locations), self.heartbeat.beat)
            self._renew()
        except Exception as error:
            raise FatalEngineError(f"new weights failed, and so did the rollback: {error}") from error

    def _check(self, measured: BatchCertainties) -> None:
        for value in (value for values in measured for value in values):
            if isinstance(value, Unmeasurable):
                is_known = value.reason is Reason.NON_FINITE_LOGITS
                what = "the policy's logits are not finite" if is_known else f"it fails: {value.message}"
                raise InvalidWeightsError(f"with them {what}")

    def _try(self, adapter: Adapter, version: Version) -> None:
        # The pass that shows which layers are called checks the logits, too.
        unused = unused_layers(adapter, self.model, lambda: self._check(self._probe(version)))
        if unused:
            raise InvalidWeightsError(
                f"the policy computes past {unused[0]} and {len(unused) - 1} more: they cannot be adapted",
                errors=[{"location": name, "message": "it is never called"} for name in unused],
            )
