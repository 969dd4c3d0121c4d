"""LoRA adapters that come and go while the policy serves, on weights that stay as they are."""

import asyncio
import logging
import time
from collections.abc import AsyncIterable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from shopr1_client.errors import InvalidWeightsError, NotFoundError, TooLargeError, UpdateConflictError
from shopr1_client.wire_policy import ADAPTER_CONFIG_KEY, BASE, AdapterRequest, AdapterUpdate
from shopr1_service.concurrency import read_foreign
from shopr1_service.core import Version
from shopr1_service.field_errors import field_problem
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.local import LoadedPolicy
from shopr1_service.policy.lora import Adapter, AdapterError, build_adapter, parse_config
from shopr1_service.scheduling.scheduler import Scheduler
from shopr1_service.scheduling.version_waiter import VersionWaiter
from shopr1_service.settings import Settings
from shopr1_service.weights.checkpoint import CheckpointError, adapter_files, open_regular
from shopr1_service.weights.safetensors_header import MAX_HEADER_BYTES, TensorEntry
from shopr1_service.weights.safetensors_stream import Upload, pour
from shopr1_service.weights.tensors import PIECE_BYTES, bytes_of

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 2.0

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class AdapterFiles:
    """Texts of an adapter's config and safetensors file."""

    config: bytes
    tensors: bytes


class TensorBuffer:
    """Takes tensors into memory (a `Sink`)."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: Sequence[TensorEntry] = ()
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._num_bytes = 0

    def announce(self, entries: Sequence[TensorEntry]) -> None:
        num_bytes = sum(entry.num_bytes for entry in entries)
        if num_bytes > self._max_bytes:
            raise TooLargeError(f"the adapter has {num_bytes} bytes, max_adapter_bytes = {self._max_bytes}")
        self._entries = entries
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8)

    def feed(self, block: memoryview) -> None:
        end = self._num_bytes + len(block)
        if end > len(self._bytes):
            raise InvalidWeightsError(f"{end - len(self._bytes)} bytes more than the header announces")
        bytes_of(self._bytes)[self._num_bytes : end] = block
        self._num_bytes = end

    def end(self) -> None:
        if self._num_bytes < len(self._bytes):
            raise InvalidWeightsError(f"the file ends {len(self._bytes) - self._num_bytes} bytes too early")

    @property
    def tensors(self) -> dict[str, Tensor]:
        # Cloned: a file need not begin its tensors where their dtype can be read.
        return {
            entry.name: self._bytes[entry.start : entry.end].clone().view(entry.dtype).view(entry.shape)
            for entry in self._entries
        }


class AdapterUpdates:
    """See the module. Used from the event loop only.

    Raises (every method):
        InvalidWeightsError: it is no adapter of this policy.
        TooLargeError: there are as many as may be, or it is too large.
        StorageError: its files cannot be read in time.
        UpdateConflictError: the policy's own weights changed meanwhile.
        NotReadyError: the service ends.
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
        self._new_versions = new_versions

    async def from_directory(self, request: AdapterRequest) -> AdapterUpdate:
        """Load an adapter from a directory below `policy_roots`."""
        start_s, base = time.perf_counter(), self._policy.versions.base
        adapter = await self._reading(request.path, self._read)
        return await self._add(adapter, request, base, start_s)

    async def files(self, path: str) -> AdapterFiles:
        """What stands in a directory below `policy_roots`, not looked at."""
        return await self._reading(path, self._files)

    async def from_upload(
        self, stream: AsyncIterable[bytes], request: AdapterRequest, config: str | bytes | None = None
    ) -> AdapterUpdate:
        """Load an adapter from a safetensors file that comes as a stream.

        Args:
            config: default: the one in the file's metadata.
        """
        start_s, base = time.perf_counter(), self._policy.versions.base
        buffer = TensorBuffer(self._settings.max_adapter_bytes)
        upload = Upload(buffer)
        await pour(stream, upload.feed)
        metadata = upload.end().metadata
        config = metadata.get(ADAPTER_CONFIG_KEY) if config is None else config
        if config is None:
            raise InvalidWeightsError(f"the file's metadata has no {ADAPTER_CONFIG_KEY}")
        adapter = await asyncio.to_thread(self._build, config, buffer.tensors)
        return await self._add(adapter, request, base, start_s)

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
        self._tell()

    async def _add(
        self, adapter: Adapter, request: AdapterRequest, base: Version, start_s: float
    ) -> AdapterUpdate:
        version, gone = await self._scheduler.between_batches(lambda: self._install(adapter, request, base))
        self._tell()
        update = AdapterUpdate(
            current=version.info,
            rank=adapter.rank,
            num_layers=len(adapter.layers),
            num_bytes=adapter.num_bytes,
            duration_s=time.perf_counter() - start_s,
            unloaded=[old.info for old in gone],
        )
        logger.info("an adapter is loaded: %s", update.model_dump_json())
        return update

    def _install(
        self, adapter: Adapter, request: AdapterRequest, base: Version
    ) -> tuple[Version, list[Version]]:
        """On the engine's thread."""
        versions = self._policy.versions
        if versions.base is not base:
            raise UpdateConflictError(
                "the policy's own weights changed meanwhile", retry_after_s=_RETRY_AFTER_S
            )
        self._check_room(request.name)
        number = versions.num_changes + 1
        version = Version(request.version or str(number), number, request.name, time.time())
        gone = self._policy.add_adapter(
            adapter, version, max_kept=self._settings.adapter_versions, is_default=request.default
        )
        return version, gone

    def _check_room(self, name: str) -> None:
        names, max_adapters = self._policy.versions.adapters, self._settings.max_adapters
        if name == BASE:
            raise InvalidWeightsError(f"an adapter cannot be called {BASE!r}: that means none")
        if name not in names and len(names) >= max_adapters:
            raise TooLargeError(f"{len(names)} adapters are loaded, max_adapters = {max_adapters}")

    def _tell(self) -> None:
        num_adapters = len(self._policy.versions.loaded())
        self._metrics.record_loaded(self._policy.info, num_adapters)
        self._new_versions.notify()

    async def _reading(self, path: str, read: Callable[[Path, Path], _Result]) -> _Result:
        def found() -> _Result:
            return read(*adapter_files(path, self._settings.policy_roots))

        try:
            return await read_foreign(found, self._read_timeout_s)
        except CheckpointError as error:
            raise field_problem(InvalidWeightsError, error.location, str(error)) from error
        except OSError as error:
            raise InvalidWeightsError(f"the adapter cannot be read: {error.strerror or error}") from error

    def _read(self, config_file: Path, tensor_file: Path) -> Adapter:
        return self._build(config_file.read_bytes(), self._tensors(tensor_file))

    def _files(self, config_file: Path, tensor_file: Path) -> AdapterFiles:
        with open_regular(tensor_file) as file:
            tensors = file.read(self._settings.max_adapter_bytes + MAX_HEADER_BYTES)
        return AdapterFiles(config_file.read_bytes(), tensors)

    def _tensors(self, path: Path) -> dict[str, Tensor]:
        buffer = TensorBuffer(self._settings.max_adapter_bytes)
        upload = Upload(buffer)
        piece = memoryview(bytearray(PIECE_BYTES))
        with open_regular(path) as file:
            while num_read := file.readinto(piece):
                upload.feed(piece[:num_read])
        upload.end()
        return buffer.tensors

    def _build(self, config: str | bytes, tensors: dict[str, Tensor]) -> Adapter:
        try:
            return build_adapter(self._policy.model, parse_config(config), tensors)
        except AdapterError as error:
            raise field_problem(InvalidWeightsError, error.location, str(error)) from error
