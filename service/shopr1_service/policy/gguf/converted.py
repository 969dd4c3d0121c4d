"""Safetensors copies of converted GGUF files, so that later starts need not convert them again.

A copy is a directory below `cache_dir`, named by the digest of the GGUF file, the dtype and the software. It
is written beside its place and renamed, read back and compared when it is made, and the checksum of its
weights is compared whenever they are used. A copy that cannot be written or read costs a conversion and no
more.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shopr1_service.policy.software import software_digest

logger = logging.getLogger(__name__)

_FOLDER = "gguf"
_PARTIAL = ".partial-"
_RECORD = "shopr1.json"
_WEIGHTS = "model.safetensors"
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Conversion:
    """A converted GGUF file.

    Attributes:
        unused: names of the file's tensors that the model has no place for.
        rope_factors: the file's divisors of RoPE frequencies; None if it has none. The model does not have
            them yet.
    """

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    unused: tuple[str, ...]
    rope_factors: tuple[float, ...] | None


class ConvertedFiles:
    """The copies, the least recently used of which are deleted beyond a number of bytes.

    Args:
        cache_dir: directory of all that is kept for later starts; it is created.
        max_bytes: most bytes of all copies.
        read: loads tokenizer and model from a copy, as from any checkpoint.
    """

    def __init__(
        self,
        cache_dir: Path,
        max_bytes: int,
        read: Callable[[Path], tuple[PreTrainedTokenizerBase, PreTrainedModel]],
    ) -> None:
        self._directory = cache_dir / _FOLDER
        self._max_bytes = max_bytes
        self._read = read

    def load(self, file: Path, dtype: torch.dtype, convert: Callable[[], Conversion]) -> Conversion:
        """The copy of a GGUF file, or its conversion, of which a copy is kept."""
        copy = self._directory / _key(file, dtype)
        if (known := self._known(copy)) is not None:
            return known
        conversion = convert()
        try:
            self._keep(copy, conversion)
        except Exception as error:  # a full disk, or a model that transformers cannot write
            logger.warning("the converted GGUF file is not kept for later starts: %s", error)
        return conversion

    def _known(self, copy: Path) -> Conversion | None:
        if not copy.is_dir():
            return None
        try:
            conversion = self._checked(copy)
            os.utime(copy)
        except Exception as error:  # a damaged copy, or another process has just deleted it
            logger.warning("%s: the kept conversion is not usable: %s", copy, error)
            shutil.rmtree(copy, ignore_errors=True)
            return None
        logger.info("the GGUF file was converted at an earlier start: %s", copy)
        return conversion

    def _checked(self, copy: Path) -> Conversion:
        record: dict[str, Any] = json.loads((copy / _RECORD).read_text())
        if _checksum(copy / _WEIGHTS) != record["weights"]:
            raise ValueError("the weights have changed since they were written")
        factors = record["rope_factors"]
        return Conversion(
            *self._read(copy), tuple(record["unused"]), None if factors is None else tuple(factors)
        )

    def _keep(self, copy: Path, conversion: Conversion) -> None:
        num_bytes = sum(tensor.nbytes for tensor in conversion.model.state_dict().values())
        if num_bytes > self._max_bytes:
            logger.info("the converted GGUF file is not kept: %d bytes exceed cache_bytes", num_bytes)
            return
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self._directory))
        try:
            self._write(partial, conversion)
            partial.rename(copy)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._delete_oldest(copy)

    def _write(self, directory: Path, conversion: Conversion) -> None:
        conversion.tokenizer.save_pretrained(directory)
        conversion.model.save_pretrained(directory, max_shard_size=2**62)
        difference = _difference(conversion, *self._read(directory))
        if difference is not None:
            raise ValueError(f"its {difference} would be another when it is read again")
        record = {
            "weights": _checksum(directory / _WEIGHTS),
            "unused": conversion.unused,
            "rope_factors": conversion.rope_factors,
        }
        (directory / _RECORD).write_text(json.dumps(record))

    def _delete_oldest(self, newest: Path) -> None:
        """Delete copies beyond the limit, and what processes left that were killed while they wrote."""
        oldest_first = sorted(self._directory.iterdir(), key=lambda each: each.stat().st_mtime)
        num_bytes = sum(map(_num_bytes, oldest_first))
        for each in oldest_first:
            if num_bytes <= self._max_bytes:
                return
            if each != newest:
                num_bytes -= _num_bytes(each)
                shutil.rmtree(each, ignore_errors=True)


def _key(file: Path, dtype: torch.dtype) -> str:
    return hashlib.sha256(f"{_digest(file)} {dtype} {software_digest()}".encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _checksum(file: Path) -> int:
    """CRC-32 of a file: as good as a digest against damage, in a third of the time."""
    checksum = 0
    with file.open("rb", buffering=0) as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _num_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _difference(
    conversion: Conversion, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> str | None:
    """The part of a conversion that differs from what was read back; None if nothing does."""
    if _facts(tokenizer) != _facts(conversion.tokenizer):
        return "tokenizer"
    if _configuration(model) != _configuration(conversion.model):
        return "config"
    if _generation(model) != _generation(conversion.model):
        return "generation config"
    ours, read = conversion.model.state_dict(), model.state_dict()
    same = ours.keys() == read.keys() and all(torch.equal(ours[name], read[name]) for name in ours)
    return None if same else "weights"


def _facts(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
    """All that decides ids, prompts and ends of turns."""
    backend: Any = cast("Any", tokenizer).backend_tokenizer
    return (
        json.loads(backend.to_str()),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        tokenizer.all_special_ids,
        tokenizer.model_max_length,
    )


def _configuration(model: PreTrainedModel) -> dict[str, Any]:
    config: dict[str, Any] = model.config.to_dict()
    return config | {"_name_or_path": None}


def _generation(model: PreTrainedModel) -> dict[str, Any] | None:
    config: Any = getattr(model, "generation_config", None)
    return None if config is None else config.to_dict()
