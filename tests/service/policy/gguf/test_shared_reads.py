"""Readers of GGUF files are shared within a block, and read the same as those outside of it."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import quants
from transformers import modeling_gguf_pytorch_utils as legacy_reader
from transformers.integrations.gguf.reader import read_gguf_metadata

from shopr1_service.policy.gguf.shared_reads import shared_reads
from tests.support.gguf_files import llama_metadata, llama_tensors, write_gguf
from tests.support.models import tiny_model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = tiny_model("llama")
    return write_gguf(tmp_path / "tiny.gguf", llama_tensors(model), llama_metadata(model))


def test_reads_are_shared_within_the_block_only(file: Path) -> None:
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    with shared_reads():
        assert gguf.GGUFReader(file) is gguf.GGUFReader(file)
        shared = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is shared
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3) is not shared
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2) is not shared
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader, names)
    assert names(gguf.MODEL_ARCH.LLAMA, 2).mapping == shared.mapping


def test_a_version_without_a_name_is_left_as_it_is(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(legacy_reader, "_gguf_parse_value")
    with shared_reads():
        assert gguf.GGUFReader(file) is gguf.GGUFReader(file)
        assert not hasattr(legacy_reader, "_gguf_parse_value")
    assert not hasattr(legacy_reader, "_gguf_parse_value")


def test_names_are_restored_after_an_error() -> None:
    reader = gguf.GGUFReader
    with pytest.raises(ZeroDivisionError), shared_reads():
        _ = 1 / 0
    assert gguf.GGUFReader is reader


def test_fields_and_tensors_are_the_same(file: Path) -> None:
    def read() -> tuple[Any, ...]:
        reader: Any = gguf.GGUFReader(file)
        parse = vars(legacy_reader)["_gguf_parse_value"]
        parsed = {
            name: [parse(field.parts[i], field.types) for i in field.data]
            for name, field in reader.fields.items()
        }
        arrays = {tensor.name: np.array(tensor.data).tobytes() for tensor in reader.tensors}
        strings = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
        return parsed, arrays, read_gguf_metadata(str(file), strings)

    expected = read()
    with shared_reads():
        assert read() == expected
        assert type(gguf.GGUFReader(file).tensors[0].data) is np.ndarray
    assert isinstance(expected[0]["general.architecture"][0], str)
    assert len(expected[0]["tokenizer.ggml.tokens"]) > 100


@pytest.mark.parametrize("shape", [(1, 256), (3, 256), (300, 256), (2, 300, 256)])
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q6_K", "IQ4_XS"])
def test_blocks_are_unpacked_bit_for_bit(kind: str, shape: tuple[int, ...]) -> None:
    block_type = gguf.GGMLQuantizationType[kind]
    block_size, num_bytes = gguf.GGML_QUANT_SIZES[block_type]
    row_bytes = shape[-1] // block_size * num_bytes
    blocks = np.random.default_rng(0).integers(0, 256, (*shape[:-1], row_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales may be infinite
        expected = quants.dequantize(blocks, block_type)
    with shared_reads(), np.errstate(all="ignore"):
        unpacked = quants.dequantize(blocks, block_type)
    assert unpacked.shape == shape
    assert unpacked.dtype == np.float32
    assert unpacked.tobytes() == expected.tobytes()
