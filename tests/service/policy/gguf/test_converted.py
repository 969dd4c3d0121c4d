"""Copies of converted GGUF files: the same bits as a conversion, whatever happened to the copy."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shopr1_service.errors import PolicyError
from shopr1_service.policy import loading
from shopr1_service.policy.gguf import converted
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.settings import Settings
from tests.support.gguf_files import llama_metadata, llama_tensors, write_gguf
from tests.support.models import tiny_model

TEXT = "  12.50 € for two mugs\n\tand 3 plates"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that have been converted."""
    made: list[Path] = []
    convert = loading._convert_gguf

    def recording(path: Path, *arguments: Any) -> converted.Conversion:
        made.append(path)
        return convert(path, *arguments)

    monkeypatch.setattr(loading, "_convert_gguf", recording)
    return made


def written(path: Path, **extra: Any) -> Path:
    """A GGUF file with divisors of RoPE frequencies and a pre-tokenizer that transformers does not know."""
    model = tiny_model("llama", hidden_size=64)
    tensors = {**llama_tensors(model), "rope_freqs.weight": torch.linspace(1, 8, 8), **extra}
    return write_gguf(path, tensors, llama_metadata(model), pre="smollm")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "tiny.gguf")


def load(file: Path, cache: Path | None, **settings: Any) -> LoadedPolicy:
    given = {"dtype": "float32", "device": "cpu", "cache_dir": cache, "cache_bytes": 2**30, **settings}
    return loading.load_policy(Settings(policy=str(file), **given))


def numbers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All tensors, also the buffers that no checkpoint holds."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def assert_equal(one: LoadedPolicy, other: LoadedPolicy) -> None:
    expected, found = numbers(one.model), numbers(other.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    configs = [
        each.model.config.to_dict() | {"_name_or_path": None, "architectures": None} for each in (one, other)
    ]
    assert configs[0] == configs[1]
    assert other.info == one.info
    assert other.codec.encode_text(TEXT) == one.codec.encode_text(TEXT)
    assert other.codec.end_tokens == one.codec.end_tokens


def copies(cache: Path) -> list[Path]:
    return sorted((cache / "gguf").iterdir())


def test_a_second_start_reads_the_copy(file: Path, cache: Path, conversions: list[Path]) -> None:
    plain = load(file, None, cache_bytes=0)
    first, second = load(file, cache), load(file, cache)
    assert conversions == [file] * 2
    assert_equal(plain, first)
    assert_equal(plain, second)
    divided, whole = (
        numbers(model)["model.rotary_emb.inv_freq"]
        for model in (second.model, tiny_model("llama", hidden_size=64))
    )
    assert torch.equal(divided, whole / torch.linspace(1, 8, 8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_copy_of_another_dtype_is_another(
    file: Path, cache: Path, conversions: list[Path], dtype: str
) -> None:
    load(file, cache, dtype="float16")
    load(file, cache, dtype=dtype)
    assert conversions == [file] * 2
    assert len(copies(cache)) == 2


def test_a_file_that_has_changed_is_converted(file: Path, cache: Path, conversions: list[Path]) -> None:
    load(file, cache)
    written(file, **{"output_norm.weight": torch.full((64,), 0.5)})
    changed = load(file, cache)
    assert len(conversions) == 2
    assert torch.equal(numbers(changed.model)["model.norm.weight"].detach(), torch.full((64,), 0.5))


def test_other_software_converts_again(
    file: Path, cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(file, cache)
    monkeypatch.setattr(converted, "software_digest", lambda: "a later version")
    load(file, cache)
    assert len(conversions) == 2


def flip(copy: Path) -> None:
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "bit": flip,
    "weights": lambda copy: (copy / "model.safetensors").unlink(),
    "record": lambda copy: (copy / "shopr1.json").write_text("{"),
    "tokenizer": lambda copy: (copy / "tokenizer.json").unlink(),
    "config": lambda copy: (copy / "config.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_copy_is_made_again(
    file: Path,
    cache: Path,
    conversions: list[Path],
    damage: Callable[[Path], object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = load(file, cache)
    [copy] = copies(cache)
    damage(copy)
    assert_equal(first, load(file, cache))
    assert "the kept conversion is not usable" in caplog.text
    assert_equal(first, load(file, cache))
    assert len(conversions) == 2


def test_a_copy_that_reads_differently_is_not_kept(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = loading._read_copy

    def other(*arguments: Any) -> Any:
        tokenizer, model = read(*arguments)
        next(model.parameters()).data[0] += 1
        return tokenizer, model

    monkeypatch.setattr(loading, "_read_copy", other)
    assert_equal(load(file, None, cache_bytes=0), load(file, cache))
    assert "its weights would be another when it is read again" in caplog.text
    assert copies(cache) == []


def test_a_directory_that_cannot_be_written(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("")
    assert_equal(load(file, None, cache_bytes=0), load(file, tmp_path / "taken"))
    assert "is not kept for later starts" in caplog.text


def test_the_least_recently_used_copies_are_deleted(
    tmp_path: Path, cache: Path, conversions: list[Path]
) -> None:
    files = [
        written(tmp_path / f"{i}.gguf", **{"output_norm.weight": torch.full((64,), float(i))})
        for i in range(3)
    ]
    load(files[0], cache)
    [copy] = copies(cache)
    num_bytes = sum(each.stat().st_size for each in copy.iterdir())
    limit = int(2.5 * num_bytes)
    for i in (1, 0, 2):  # 0 is used again
        load(files[i], cache, cache_bytes=limit)
    assert len(copies(cache)) == 2
    load(files[0], cache, cache_bytes=limit)
    assert conversions == [files[0], files[1], files[2]]
    load(files[1], cache, cache_bytes=limit)
    assert conversions[3:] == [files[1]]


def test_a_copy_beyond_the_limit_is_not_made(
    file: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    load(file, cache, cache_bytes=1000)
    assert "exceed cache_bytes" in caplog.text
    assert not (cache / "gguf").exists()


def test_partial_copies_are_no_copies(file: Path, cache: Path, conversions: list[Path]) -> None:
    """A process that was killed while it wrote leaves its directory, under another name."""
    load(file, cache)
    [copy] = copies(cache)
    copy.rename(copy.with_name(".partial-killed"))
    load(file, cache)
    assert len(conversions) == 2


def test_tensors_without_a_place_are_refused_from_a_copy_too(tmp_path: Path, cache: Path) -> None:
    file = written(tmp_path / "more.gguf", **{"blk.0.unknown.weight": torch.zeros(3)})
    load(file, cache, ignored_tensors="blk.0.unknown.weight")
    with pytest.raises(PolicyError, match=r"blk\.0\.unknown\.weight"):
        load(file, cache)
