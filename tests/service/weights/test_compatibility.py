"""Checkpoints of another policy: the same shapes, and yet other numbers."""

import errno
import json
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shopr1_client.errors import InvalidWeightsError
from shopr1_service.weights.checkpoint import CheckpointDirectory, CheckpointError
from shopr1_service.weights.compatibility import check_compatible
from tests.support.http import problem
from tests.support.models import (
    FAMILIES,
    byte_fallback,
    byte_level,
    byte_level_json,
    model_of,
    one_thread,
    tiny_model,
    wrapped,
)
from tests.support.updating import Service, Unchanged, changed_model, done, flaws, saved, updatable

CONFIG, TOKENIZER = "config.json", "tokenizer.json"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def of_json(change: Callable[[Any], None]) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with a change of its file."""
    content = json.loads(byte_level_json())
    change(content)
    return wrapped(Tokenizer.from_str(json.dumps(content)))


def merges_swapped(content: Any) -> None:
    content["model"]["merges"].reverse()


def a_merge_dropped(content: Any) -> None:
    content["model"]["merges"].pop(0)


def pieces_swapped(content: Any) -> None:
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def with_pre_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(byte_level_json())
    digits = pre_tokenizers.Split(" ", "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
    return wrapped(tokenizer)


def with_more_tokens() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


VOCABULARY, CUTS = "its vocabulary is not the policy's", "it splits text differently"
TOKENIZERS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "another kind": (byte_fallback, VOCABULARY),
    "one token more": (with_more_tokens, VOCABULARY),
    "two ids swapped": (lambda: of_json(pieces_swapped), VOCABULARY),
    "merges in another order": (lambda: of_json(merges_swapped), CUTS),
    "a merge less": (lambda: of_json(a_merge_dropped), CUTS),
    "a normalizer": (lambda: byte_level(normalizer=normalizers.Lowercase()), CUTS),
    "another pre-tokenizer": (with_pre_tokenizer, CUTS),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    "num_attention_heads": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
    "rms_norm_eps": {"rms_norm_eps": 0.1},
    "max_position_embeddings": {"max_position_embeddings": 256},  # some rotate by it
    "hidden_act": {"hidden_act": "gelu"},
    "tie_word_embeddings": {"tie_word_embeddings": True},
}


def opened(directory: Path) -> CheckpointDirectory:
    return CheckpointDirectory(str(directory), [directory])


def check(directory: Path, **options: Any) -> None:
    check_compatible(opened(directory), tiny_model(**options).config, byte_level())


# --- compatible -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_saved_is_itself(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    model.config.save_pretrained(tmp_path)
    check_compatible(opened(tmp_path), model.config, byte_level())


@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback])
def test_a_tokenizer_saved_is_itself(
    tokenizer: Callable[[], PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    tokenizer().save_pretrained(tmp_path)
    check_compatible(opened(tmp_path), tiny_model().config, tokenizer())


def test_weights_alone_are_enough(tmp_path: Path) -> None:
    check(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"use_cache": False},
        {"attention_dropout": 0.5},
        {"eos_token_id": 7},
        {"initializer_range": 0.02},
        {"_name_or_path": "elsewhere"},
        {"dtype": "float16"},
        {"transformers_version": "4.0.0"},
    ],
)
def test_fields_without_effect_on_logits_may_differ(change: dict[str, Any], tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    path = tmp_path / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    check(tmp_path)


def test_another_chat_template_is_logged_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    byte_level(chat_template="{{ messages }}").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        check(tmp_path)
    assert "the checkpoint has another chat template" in caplog.text


# --- incompatible, through the route ---------------------------------------------------------------


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with updatable(policy_roots=(tmp_path,)) as service:
        yield service


@pytest.mark.anyio
@pytest.mark.parametrize("name", TOKENIZERS)
async def test_another_tokenizer(service: Service, name: str, tmp_path: Path) -> None:
    make, message = TOKENIZERS[name]
    path = saved(tmp_path / "new", changed_model(), make())
    async with Unchanged(service):
        found = flaws(await service.update(path))
    assert found.keys() == {TOKENIZER}
    assert found[TOKENIZER].startswith(message)


@pytest.mark.anyio
@pytest.mark.parametrize("name", CONFIGS)
async def test_another_config(service: Service, name: str, tmp_path: Path) -> None:
    model = changed_model(**CONFIGS[name])
    if not CONFIGS[name].get("tie_word_embeddings"):
        own = tiny_model().state_dict()
        assert {key: tensor.shape for key, tensor in model.state_dict().items()} == {
            key: tensor.shape for key, tensor in own.items()
        }
    path = saved(tmp_path / "new", model)
    async with Unchanged(service):
        found = flaws(await service.update(path))
    assert any(location.startswith(f"{CONFIG}: ") and location.endswith(name) for location in found)


@pytest.mark.anyio
async def test_another_architecture(service: Service, tmp_path: Path) -> None:
    path = saved(tmp_path / "new", tiny_model("qwen2"))
    async with Unchanged(service):
        found = flaws(await service.update(path))
    # Not what it is in the file: errors show no more of a file than its keys.
    assert found[f"{CONFIG}: model_type"] == "it differs from the policy's, 'llama'"


@pytest.mark.anyio
@pytest.mark.parametrize("name", [CONFIG, TOKENIZER])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "none"}'])
async def test_damaged_files(service: Service, name: str, content: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "new", changed_model())
    (tmp_path / "new" / name).write_text(content)
    async with Unchanged(service):
        assert flaws(await service.update(path)).keys() == {name}


@pytest.mark.anyio
async def test_code_of_a_checkpoint_is_not_run(service: Service, tmp_path: Path) -> None:
    path = saved(tmp_path / "new", changed_model())
    config = tmp_path / "new" / CONFIG
    own = {**json.loads(config.read_text()), "auto_map": {"AutoConfig": "mine.Mine"}, "model_type": "mine"}
    config.write_text(json.dumps(own))
    (tmp_path / "new" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    async with Unchanged(service):
        assert flaws(await service.update(path)).keys() == {CONFIG}
    assert not (tmp_path / "ran").exists()


@pytest.mark.anyio
async def test_a_compatible_checkpoint_is_accepted(service: Service, tmp_path: Path) -> None:
    done(await service.update(saved(tmp_path / "new", changed_model())))


def test_all_that_differs_is_named(tmp_path: Path) -> None:
    tiny_model(rms_norm_eps=0.1, hidden_act="gelu").config.save_pretrained(tmp_path)
    byte_fallback().save_pretrained(tmp_path)
    with pytest.raises(InvalidWeightsError) as caught:
        check(tmp_path)
    locations = [each["location"] for each in caught.value.errors]
    assert locations == [f"{CONFIG}: hidden_act", f"{CONFIG}: rms_norm_eps", TOKENIZER]
    assert all(location in caught.value.detail for location in locations)


@pytest.mark.parametrize("name", [CONFIG, TOKENIZER, "tokenizer_config.json"])
def test_links_out_of_the_roots_are_not_read(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "new"
    tiny_model().config.save_pretrained(directory)
    byte_level().save_pretrained(directory)
    check(directory)
    (directory / name).rename(tmp_path / name)
    (directory / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="leads out of the `policy_roots`") as caught:
        check(directory)
    assert caught.value.location == name


@pytest.mark.parametrize("name", [CONFIG, TOKENIZER])
def test_errors_do_not_quote_damaged_files(tmp_path: Path, name: str) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    (tmp_path / name).write_text('{"model_type": "confidential')
    with pytest.raises(InvalidWeightsError) as caught:
        check(tmp_path)
    assert caught.value.detail.startswith(f"{name} cannot be read: ")
    assert "confidential" not in f"{caught.value.detail}{caught.value.errors}"
    assert str(tmp_path) not in caught.value.detail


# --- contents of files, and files of other names -----------------------------------------------------


def with_options(directory: Path, name: str, **options: Any) -> None:
    tiny_model().config.save_pretrained(directory)
    byte_level().save_pretrained(directory)
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_act": "confidential"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20261128.5}},
        {"password": "confidential"},  # pragma: allowlist secret
        {"nested": {"token": ["confidential", 20261128.5]}},
        {"model_type": "qwen2", "secret": {"confidential": "confidential"}},
    ],
)
def test_values_of_a_config_are_not_shown(tmp_path: Path, options: dict[str, Any]) -> None:
    with_options(tmp_path, CONFIG, **options)
    with pytest.raises(InvalidWeightsError) as caught:
        check(tmp_path)
    shown = f"{caught.value.detail}{caught.value.errors}"
    assert "20261128" not in shown
    assert "confidential" not in shown.replace("secret.confidential", "")  # that is a key


@pytest.mark.parametrize(
    "options",
    [
        {"\ud800" + "x" * 10_000: 1},
        {f"key{number}": number for number in range(10_000)},
        {"to_dict": 1, "hidden_act": "gelu"},
        {"get_text_config": 1, "model_type": "qwen2"},
        {"deep": json.loads("[" * 900 + "]" * 900), "deeper": json.loads('{"a":' * 900 + "1" + "}" * 900)},
    ],
)
def test_odd_configs_give_short_errors(tmp_path: Path, options: dict[str, Any]) -> None:
    with_options(tmp_path, CONFIG, **options)
    with pytest.raises(InvalidWeightsError) as caught:
        check(tmp_path)
    assert len(caught.value.detail.encode()) < 2000
    assert len(json.dumps(caught.value.errors, ensure_ascii=False).encode()) < 20_000


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("tokenizer_config.json", "vocab_file"),
        ("tokenizer_config.json", "tokenizer_file"),
        ("tokenizer_config.json", "fast_tokenizer_files"),
        ("tokenizer_config.json", "vocab"),
        ("tokenizer_config.json", "merges"),
        ("tokenizer_config.json", "gguf_file"),
        ("tokenizer_config.json", "init_inputs"),
        (CONFIG, "configuration_files"),
    ],
)
def test_files_of_other_names_are_not_opened(
    tmp_path: Path, name: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers never sees a key by which it could be led out of the copies."""
    directory, outside, seen = tmp_path / "new", tmp_path / "outside.json", list[Any]()
    outside.write_text(byte_level_json())
    with_options(directory, name, **{key: [str(outside)] if key.endswith("s") else str(outside)})
    read = AutoTokenizer.from_pretrained

    def spy(copies: str, **options: Any) -> Any:
        seen.append(json.loads(Path(copies, name).read_text()))
        return read(copies, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", spy)
    check(directory)
    assert key not in seen[0]
    assert seen[0].keys() > {"model_type" if name == CONFIG else "eos_token"}


def test_tokens_are_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of vocab.json are tokens, one of which may be called "files"."""
    with_options(tmp_path, CONFIG)
    (tmp_path / "vocab.json").write_text('{"files": 0, "vocab": 1}')
    seen = []

    def spy(copies: str, **_: Any) -> Any:
        seen.append(Path(copies, "vocab.json").read_text())
        return byte_level()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", spy)
    check(tmp_path)
    assert seen == ['{"files": 0, "vocab": 1}']


# --- a full disk -----------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("name", [CONFIG, TOKENIZER, None])
async def test_full_disk_is_one_of_the_service(
    service: Service, tmp_path: Path, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the checkpoint, which can be read."""
    path = saved(tmp_path / "new", changed_model())
    write, make = Path.write_bytes, tempfile.TemporaryDirectory

    def full_write(file: Path, content: bytes) -> int:
        if file.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, content)

    def full_make(**options: Any) -> Any:
        if name is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return make(**options)

    async with Unchanged(service):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full_write)
            patch.setattr(tempfile, "TemporaryDirectory", full_make)
            refused = problem(await service.update(path), 507, "storage")
    what = "copies of the checkpoint's config and tokenizer"
    assert refused["detail"] == f"{what} cannot be kept in staging_dir: No space left on device"
    done(await service.update(path))
