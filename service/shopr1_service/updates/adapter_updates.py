"""LoRA adapters, loaded and unloaded while the policy serves; its own weights stay as they are."""

import asyncio
import logging
import time
from collections.abc import AsyncIterable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from shopr1_client.errors import (
    InvalidWeightsError,
    NotFoundError,
    StorageError,
    TooLargeError,
    UpdateConflictError,
)
from shopr1_client.wire_policy import (
    ADAPTER_CONFIG_KEY,
    BASE,
    BASE_SAMPLE_KEY,
    AdapterRequest,
    AdapterUpdate,
)
from shopr1_service.concurrency import read_foreign
from shopr1_service.core import Version
from shopr1_service.errors import RETRY_UPDATE_AFTER_S
from shopr1_service.field_errors import field_problem
from shopr1_service.memory.budget import Account, Hold
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.adapters.base_sample import check_base
from shopr1_service.policy.adapters.lora import Adapter, AdapterError, build_adapter, parse_config
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.scheduling.scheduler import Scheduler
from shopr1_service.scheduling.version_waiter import VersionWaiter
from shopr1_service.settings import Settings
from shopr1_service.weights.checkpoint import CheckpointDirectory, CheckpointError
from shopr1_service.weights.file_tensors import FileTensors
from shopr1_service.weights.files import AnonymousTempFile
from shopr1_service.weights.safetensors_header import Header
from shopr1_service.weights.safetensors_stream import SafetensorsStream, feed_in_threads

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class AdapterFiles:
    """Contents of an adapter's config and safetensors file."""

    config: bytes
    tensors: bytes


class AdapterUpdates:
    """Adapters of the policy in this process. Used from the event loop only.

    Raises (every method):
        InvalidWeightsError: not an adapter of this policy.
        TooLargeError: too many adapters, it is too large, or there is no memory for it.
        OverloadedError: there is no memory for it now.
        StorageError: an upload cannot be stored, or files cannot be read, or not in time.
        UpdateConflictError: the policy's own weights changed meanwhile.
        NotReadyError: the service shuts down.
    """

    def __init__(
        self,
        policy: LoadedPolicy,
        scheduler: Scheduler,
        settings: Settings,
        metrics: Metrics,
        new_versions: VersionWaiter,
    ) -> None:
        self._policy = policy
        self._scheduler = scheduler
        self._settings = settings
        self._read_timeout_s = settings.read_timeout_s
        self._metrics = metrics.policy
        self._memory = metrics.memory
        self._new_versions = new_versions

    async def from_directory(self, request: AdapterRequest) -> AdapterUpdate:
        """Load an adapter from a directory below `policy_roots`."""
        start_s, base = time.perf_counter(), self._policy.versions.base
        adapter = await self._read(request.path, self._build_from)
        return await self._load(adapter, request, base, start_s)

    async def files(self, path: str) -> AdapterFiles:
        """Read a directory below `policy_roots`; only the sizes and the header are checked."""
        return await self._read(path, self._contents)

    async def from_upload(
        self, stream: AsyncIterable[bytes], request: AdapterRequest, config: bytes | None = None
    ) -> AdapterUpdate:
        """Load an adapter from a safetensors file that arrives as a stream.

        It is written to an anonymous file in `staging_dir`, of which one tensor at a time is read.

        Args:
            config: default: the one in the file's metadata.
        """
        start_s, base = time.perf_counter(), self._policy.versions.base
        file = AnonymousTempFile(self._settings.staging_dir, "the adapter")

        def expect(header: Header) -> None:
            self._check_size(header)
            file.reserve(header.num_bytes)

        def append(block: memoryview) -> None:
            file.append(block)

        try:
            parser = SafetensorsStream(expect, append)
            await feed_in_threads(stream, parser.feed)
            header = parser.finish()
            config = _config_in(header) if config is None else config
            adapter = await asyncio.to_thread(self._build, config, header, FileTensors(file, header))
        except Exception as error:  # after a cancellation, a thread may still be reading
            file.discard()
            if isinstance(error, OSError):
                message = f"the adapter cannot be read again: {error.strerror or error}"
                raise StorageError(message) from error
            raise
        # All of it has been read. A refusal's traceback would hold the file until the garbage collector runs.
        await asyncio.to_thread(file.discard)
        return await self._load(adapter, request, base, start_s)

    async def unload(self, name: str, version: str | None = None) -> None:
        """Unload an adapter, or one version of it.

        Raises:
            NotFoundError: it is not loaded.
        """

        def remove() -> None:
            versions = self._policy.versions.adapters.get(name, ())
            gone = [each for each in versions if version in (None, each.name)]
            if not gone:
                raise NotFoundError(f"no adapter {name!r}" + (f" in version {version!r}" if version else ""))
            self._policy.remove_adapters(gone)

        await self._scheduler.between_batches(remove)
        self._announce()

    async def _load(
        self, adapter: Adapter, request: AdapterRequest, base: Version, start_s: float
    ) -> AdapterUpdate:
        memory = self._memory.hold(Account.ADAPTERS, adapter.num_bytes)
        version, gone = await self._scheduler.between_batches(
            lambda: self._install(adapter, request, base, memory)
        )
        self._announce()
        update = AdapterUpdate(
            current=version.info,
            rank=adapter.rank,
            num_layers=len(adapter.layers),
            num_bytes=adapter.num_bytes,
            duration_s=time.perf_counter() - start_s,
            unloaded=[old.info for old in gone],
        )
        logger.info("an adapter was loaded: %s", update.model_dump_json())
        return update

    def _install(
        self, adapter: Adapter, request: AdapterRequest, base: Version, memory: Hold
    ) -> tuple[Version, list[Version]]:
        """New version, and older ones that were unloaded.

        Runs on the engine's thread, also if the caller has gone: so it releases `memory`.
        """
        with memory:
            return self._install_held(adapter, request, base, memory)

    def _install_held(
        self, adapter: Adapter, request: AdapterRequest, base: Version, memory: Hold
    ) -> tuple[Version, list[Version]]:
        versions = self._policy.versions
        if versions.base is not base:
            raise UpdateConflictError(
                "the policy's own weights changed meanwhile", retry_after_s=RETRY_UPDATE_AFTER_S
            )
        self._check_room(request.name)
        number = versions.num_changes + 1
        version = Version(request.version or str(number), number, request.name, time.time())
        gone = self._policy.add_adapter(
            adapter,
            version,
            max_kept=self._settings.adapter_versions,
            is_default=request.default,
            memory=memory,
        )
        return version, gone

    def _check_room(self, name: str) -> None:
        names, max_adapters = self._policy.versions.adapters, self._settings.max_adapters
        if name == BASE:
            raise InvalidWeightsError(f"an adapter cannot be called {BASE!r}: that means none")
        if name not in names and len(names) >= max_adapters:
            raise TooLargeError(f"{len(names)} adapters are loaded, max_adapters = {max_adapters}")

    def _announce(self) -> None:
        num_adapters = len(self._policy.versions.loaded())
        self._metrics.record_loaded(self._policy.info, num_adapters)
        self._new_versions.notify()

    async def _read(self, path: str, read: Callable[[CheckpointDirectory], _Result]) -> _Result:
        """The result of `read`, if the directory's files did not change meanwhile."""

        def read_unchanged() -> _Result:
            directory = CheckpointDirectory(path, self._settings.policy_roots)
            with directory.unchanged():
                return read(directory)

        try:
            return await read_foreign(read_unchanged, self._read_timeout_s)
        except CheckpointError as error:
            raise field_problem(InvalidWeightsError, error.location, str(error)) from error
        except OSError as error:
            raise StorageError(f"the adapter cannot be read: {error.strerror or error}") from error

    def _contents(self, directory: CheckpointDirectory) -> AdapterFiles:
        config, shard = directory.adapter()
        self._check_size(shard.header)
        return AdapterFiles(config, shard.file.read(0, shard.file.num_bytes))

    def _build_from(self, directory: CheckpointDirectory) -> Adapter:
        config, shard = directory.adapter()
        self._check_size(shard.header)
        return self._build(config, shard.header, FileTensors(shard.file, shard.header, shard.data_start))

    def _check_size(self, header: Header) -> None:
        num_bytes, max_bytes = header.num_bytes, self._settings.max_adapter_bytes
        if num_bytes > max_bytes:
            raise TooLargeError(f"the adapter has {num_bytes} bytes, max_adapter_bytes = {max_bytes}")

    def _build(self, config: bytes, header: Header, tensors: Mapping[str, Tensor]) -> Adapter:
        try:
            adapter = build_adapter(self._policy.model, parse_config(config), tensors)
            if (base_sample := header.metadata.get(BASE_SAMPLE_KEY)) is not None:
                check_base(self._policy.model, base_sample)
        except AdapterError as error:
            raise field_problem(InvalidWeightsError, error.location, str(error)) from error
        return adapter


def _config_in(header: Header) -> bytes:
    if ADAPTER_CONFIG_KEY not in header.metadata:
        raise InvalidWeightsError(f"the file's metadata has no {ADAPTER_CONFIG_KEY}")
    return header.metadata[ADAPTER_CONFIG_KEY].encode()
