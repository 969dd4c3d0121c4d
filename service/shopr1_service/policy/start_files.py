"""Files of the policy that is loaded at start, which a trainer may replace or overwrite at any time.

A start that finds other files at its end than at its beginning has mixed two checkpoints, and is refused.
Afterwards the policy needs none of them: transformers maps safetensors into memory on a CPU, where a later
write to the file would change the weights that serve, and a truncation would end the process.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shopr1_service.errors import PolicyError

_READ = (".safetensors", ".jinja", ".model", ".txt")
_READ_JSON = ("config", "tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "model")
"""Beginnings of names; a trainer's own JSON may change."""


@contextmanager
def unchanged(directory: Path, file: str | None = None) -> Iterator[None]:
    """Refuse to start if a file of the policy changes while this lasts.

    Args:
        file: the only one that is read; default: all that transformers may read.

    Raises:
        PolicyError: names it.
    """
    before = _identities(directory, file)
    yield
    after = _identities(directory, file)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    if changed:
        raise PolicyError(f"{changed[0]} was replaced or written to while it was read: start again")


@torch.no_grad()
def move_into_memory(model: PreTrainedModel) -> None:
    """Copy all tensors of a model on a CPU, one after the other; tensors that share memory still do."""
    copies: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "cpu" or type(tensor.data) is not Tensor:  # quantised ones hold others
            continue
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        if place not in copies:
            copies[place] = tensor.data.clone()
        tensor.data = copies[place]


def _identities(directory: Path, file: str | None) -> Mapping[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for path in directory.iterdir():
        if path.name == file if file else _is_read(path):
            with suppress(OSError):  # it was deleted since, or is a link to nothing
                status = path.stat()
                found[path.name] = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return found


def _is_read(path: Path) -> bool:
    return path.suffix in _READ or (path.suffix == ".json" and path.name.startswith(_READ_JSON))
