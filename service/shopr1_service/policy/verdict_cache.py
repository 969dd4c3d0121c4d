"""A file that keeps the outcomes of the check at load.

The key is a digest of all that decides the outcome but the values of the weights: the architecture, its
config, the shapes of its weights, the device, the versions of the libraries, the length that was checked.
A known outcome is confirmed by a few short passes.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedModel

from shopr1_service.engine.forward.base import Forward
from shopr1_service.engine.forward.self_check import Cause, Rejection, Verdict
from shopr1_service.policy.software import software_digest

logger = logging.getLogger(__name__)

VERDICTS = "self_check.json"
"""Name of the file in `cache_dir`."""
_MAX_ENTRIES = 256


class KnownVerdict(BaseModel):
    """The outcome of a full check.

    Attributes:
        forward: name of the chosen strategy.
        rejected: path, cause and detail of the faster ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    forward: str
    rejected: tuple[tuple[str, Cause, str], ...] = ()
    remarks: tuple[str, ...] = ()
    feeds_whole: bool = False

    @classmethod
    def of(cls, verdict: Verdict) -> "KnownVerdict":
        rejected = tuple((each.path, each.cause, each.detail) for each in verdict.rejected)
        return cls(
            forward=verdict.forward.name,
            rejected=rejected,
            remarks=verdict.remarks,
            feeds_whole=verdict.feeds_whole,
        )

    def verdict(self, forward: Forward) -> Verdict:
        """The outcome, with the strategy of this name."""
        rejected = tuple(Rejection(*each) for each in self.rejected)
        return Verdict(forward, rejected, self.remarks, self.feeds_whole)


class VerdictCache:
    """Outcomes by key, in a JSON file. One that cannot be read or written costs a full check and no more."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def get(self, key: str) -> KnownVerdict | None:
        try:
            return KnownVerdict.model_validate(self._entries()[key], strict=False)
        except KeyError:
            return None
        except ValidationError as error:
            logger.warning("%s: the outcome of an earlier check is malformed: %s", self._file, error)
            return None

    def put(self, key: str, verdict: KnownVerdict) -> None:
        """Replace the file by one with this outcome, the newest last."""
        entries = {name: value for name, value in self._entries().items() if name != key}
        entries[key] = verdict.model_dump(mode="json")
        try:
            self._write(dict(list(entries.items())[-_MAX_ENTRIES:]))
        except OSError as error:
            logger.warning("the outcome of the check cannot be kept: %s", error)

    def _entries(self) -> Mapping[str, Any]:
        try:
            entries = json.loads(self._file.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning("outcomes of earlier checks cannot be read from %s: %s", self._file, error)
            return {}
        return entries if isinstance(entries, dict) else {}

    def _write(self, entries: Mapping[str, Any]) -> None:
        """Write another file and rename it: several services may start at the same time."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self._file.parent, delete=False) as file:
            try:
                json.dump(entries, file, indent=1)
                file.flush()
                Path(file.name).replace(self._file)
            except BaseException:
                Path(file.name).unlink()
                raise


def verdict_key(model: PreTrainedModel, num_tokens: int) -> str:
    """The key of a check of this model.

    Args:
        num_tokens: of the longest sequence that is checked.
    """
    # The config's own differences from its class's defaults, and the attention that it chose.
    config = json.loads(model.config.to_json_string(use_diff=False))
    for volatile in ("_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    parts = {
        "architecture": type(model).__name__,
        "config": config,
        "attention": getattr(model.config, "_attn_implementation", None),
        "weights": [(name, list(each.shape), str(each.dtype)) for name, each in model.state_dict().items()],
        "device": _device_name(model.device),
        "software": software_digest(),
        "num_tokens": num_tokens,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name(device)
