"""A policy's files that change while, and after, it is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from shopr1_service.errors import PolicyError
from shopr1_service.policy import loading
from shopr1_service.policy.loading import load_model
from shopr1_service.policy.start_files import move_into_memory, unchanged
from shopr1_service.settings import DType, Settings
from tests.support.models import one_thread, tiny_model
from tests.support.updating import changed_model, file_of, saved, weights_of

WEIGHTS = "model.safetensors"


def load(directory: Path) -> PreTrainedModel:
    settings = Settings(policy=str(directory), dtype=DType.FLOAT32, device="cpu")
    with one_thread():
        return load_model(loading.find_source(str(directory)), settings)[1]


def replace(path: Path, content: bytes) -> None:
    path.with_name("new").write_bytes(content)
    path.with_name("new").rename(path)


def overwrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def cut(path: Path, _content: bytes) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("change", [replace, overwrite, cut])
def test_file_that_changes_after_the_start(tmp_path: Path, change: Callable[[Path, bytes], None]) -> None:
    """The policy that serves is the one that was loaded."""
    saved(tmp_path / "latest", tiny_model())
    model = load(tmp_path / "latest")
    change(tmp_path / "latest" / WEIGHTS, file_of(changed_model(), format="pt"))
    expected = weights_of(tiny_model())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("change", [replace, overwrite])
def test_file_that_changes_during_the_start(
    tmp_path: Path, name: str, change: Callable[[Path, bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(saved(tmp_path / "latest", tiny_model())) / name
    other = Path(saved(tmp_path / "other", changed_model())) / name
    content = other.read_bytes() if name == WEIGHTS else json.dumps(json.loads(other.read_text())).encode()
    read = loading._read_model

    def reading(*args: Any) -> PreTrainedModel:
        change(path, content)  # after the tokenizer and before the weights
        return read(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loading, "_read_model", reading)
        with pytest.raises(PolicyError, match=f"^{name} was replaced or written to while it was read"):
            load(path.parent)
    load(path.parent)


def test_other_files_may_change(tmp_path: Path) -> None:
    for name in ("trainer_state.json", "optimizer.pt", "policy.gguf", "notes.md"):
        (tmp_path / name).write_text("1")
    with unchanged(tmp_path):
        (tmp_path / "trainer_state.json").write_text("two")
        (tmp_path / "step-2").mkdir()
        (tmp_path / "policy.gguf").unlink()
    (tmp_path / "policy.gguf").touch()
    with unchanged(tmp_path, "policy.gguf"):
        (tmp_path / "config.json").write_text("two")
    with pytest.raises(PolicyError, match=r"policy\.gguf was replaced"), unchanged(tmp_path, "policy.gguf"):
        (tmp_path / "policy.gguf").write_text("two")
    with pytest.raises(PolicyError, match=r"config\.json was replaced"), unchanged(tmp_path):
        (tmp_path / "config.json").unlink()


def test_tensors_that_share_memory_still_do() -> None:
    model: Any = tiny_model(tie_word_embeddings=True)
    layer = nn.Linear(2, 3)
    layer.weight = nn.Parameter(model.lm_head.weight.data.T)  # another view of the same numbers
    model.add_module("further", layer)
    model.register_buffer("same", model.lm_head.weight.data)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    place = model.lm_head.weight.data_ptr()
    move_into_memory(model)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr() != place
    assert model.same.data_ptr() == model.lm_head.weight.data_ptr()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
