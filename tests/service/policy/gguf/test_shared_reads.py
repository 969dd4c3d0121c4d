"""Readers of GGUF files are shared within a block, and equal to those outside of it."""

from pathlib import Path

import gguf

from shopr1_service.policy.gguf.shared_reads import shared_reads
from tests.support.gguf_files import llama_metadata, llama_tensors, write_gguf
from tests.support.models import tiny_model


def test_reads_are_shared_within_the_block_only(tmp_path: Path) -> None:
    model = tiny_model("llama")
    file = write_gguf(tmp_path / "tiny.gguf", llama_tensors(model), llama_metadata(model))
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    with shared_reads():
        assert gguf.GGUFReader(file) is gguf.GGUFReader(file)
        shared = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is shared
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3) is not shared
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2) is not shared
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader, names)
    assert names(gguf.MODEL_ARCH.LLAMA, 2).mapping == shared.mapping
