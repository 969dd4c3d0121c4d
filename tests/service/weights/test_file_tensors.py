"""Tensors that are read from files when they are asked for."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from shopr1_service.weights.checkpoint import CheckpointDirectory
from shopr1_service.weights.file_tensors import FileTensors
from shopr1_service.weights.files import CheckpointFile

TENSORS = {
    "b": torch.arange(6.0).view(2, 3),
    "a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
}


def opened(directory: Path) -> FileTensors:
    safetensors.torch.save_file(TENSORS, directory / "model.safetensors")
    [shard] = CheckpointDirectory(str(directory), [directory]).weights()
    return FileTensors(shard.file, shard.header, shard.data_start)


def test_tensors_are_those_of_the_file(tmp_path: Path) -> None:
    tensors = opened(tmp_path)
    assert list(tensors) == sorted(TENSORS)
    assert len(tensors) == 4
    for name, expected in TENSORS.items():
        assert tensors[name].dtype == expected.dtype
        assert torch.equal(tensors[name], expected)
    with pytest.raises(KeyError):
        tensors["none"]


def test_tensors_are_read_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, read_bytes = opened(tmp_path), list[int]()
    read_into = CheckpointFile.read_into

    def counting(file: CheckpointFile, block: memoryview, start: int) -> None:
        read_bytes.append(block.nbytes)
        read_into(file, block, start)

    monkeypatch.setattr(CheckpointFile, "read_into", counting)
    assert "b" in tensors
    assert read_bytes == []
    first, second = tensors["b"], tensors["b"]
    assert read_bytes == [24, 24]
    assert first.data_ptr() != second.data_ptr()
