"""Fields of `adapter_config.json` that are read, ignored and refused."""

import contextlib
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shopr1_service.policy.adapters.lora_config import AdapterError, LoraConfig, parse_config

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}

# As PEFT 0.21 writes it, except the lists of modules.
WRITTEN = """
{
  "alora_invocation_tokens": null, "alpha_pattern": {"self_attn.o_proj": 4}, "arrow_config": null,
  "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
  "base_model_name_or_path": "org/policy", "bias": "none", "corda_config": null, "ensure_weight_tying": false,
  "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
  "init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
  "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 16, "lora_bias": false, "lora_dropout": 0.05,
  "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
  "monteclora_config": null, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 8,
  "rank_pattern": {"v_proj": 2}, "revision": null, "target_modules": ["q_proj", "v_proj", "o_proj"],
  "target_parameters": null, "task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_bdlora": null,
  "use_dora": false, "use_qalora": false, "use_rslora": false, "velora_config": null
}
"""


def config(**options: Any) -> LoraConfig:
    return parse_config(json.dumps({**PLAIN, **options}))


def refusal(**options: Any) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        config(**options)
    return caught.value


@pytest.mark.parametrize("text", [WRITTEN, WRITTEN.encode()])
def test_a_config_of_peft(text: str | bytes) -> None:
    read = parse_config(text)
    assert read == LoraConfig(
        peft_type="LORA",
        r=8,
        lora_alpha=16.0,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"self_attn.o_proj": 4.0},
    )
    prefix = "model.layers.1.self_attn"
    names = [f"{prefix}.q_proj", f"{prefix}.v_proj", f"{prefix}.o_proj"]
    assert [read.rank(name) for name in names] == [8, 2, 8]
    assert [read.scale(name) for name in names] == [16 / 8, 16 / 2, 4 / 8]


def test_rank_stabilised() -> None:
    read = config(r=9, rank_pattern={"v": 4}, alpha_pattern={"u": 3}, use_rslora=True)
    assert [read.scale(name) for name in ("x.q", "x.v", "x.u")] == [16 / 3, 16 / 2, 3 / 3]
    assert not config().use_rslora


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("q_proj", [True, True, False]),  # the end of a name, from a dot on
        ("proj", [False, False, False]),
        ("1.q_proj", [False, True, False]),
        (r".*\.1\..*", [False, True, True]),
        (r"^layers\.0\.q_proj", [True, False, False]),
        ("q_proj|layers.1.qk_proj", [True, True, True]),
        ("layers", [False, False, False]),
    ],
)
def test_patterns_are_regular_expressions(pattern: str, matches: list[bool]) -> None:
    read = config(rank_pattern={pattern: 3})
    names = ["layers.0.q_proj", "layers.1.q_proj", "layers.1.qk_proj"]
    assert [read.rank(name) == 3 for name in names] == matches
    assert [read.rank(name) for name in names] == [3 if match else 8 for match in matches]


def test_first_pattern_counts() -> None:
    read = config(rank_pattern={"layers.0.*": 3, ".*q": 4, "layers.1.q": 5})
    assert [read.rank(name) for name in ("layers.0.q", "layers.1.q", "layers.1.k")] == [3, 4, 8]


def test_contradicting_alphas() -> None:
    # PEFT sorts patterns when it writes them, so which was the first when it trained is not known.
    read = config(alpha_pattern={"layers.0.*": 3, ".*q": 4, "layers.1.q": 4})
    assert [read.scale(name) for name in ("layers.0.k", "layers.1.q", "layers.1.k")] == [3 / 8, 4 / 8, 16 / 8]
    with pytest.raises(AdapterError, match=r"^alpha_pattern: several match 'layers\.0\.q'"):
        read.scale("layers.0.q")


def test_a_pattern_may_be_a_whole_name_that_is_no_match_of_itself() -> None:
    assert config(rank_pattern={"a$b": 3}).rank("a$b") == 3


def test_patterns_may_be_null() -> None:
    assert config(rank_pattern=None, alpha_pattern=None) == config()


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_harmless_initialisations(init: bool | str | None) -> None:
    assert config(init_lora_weights=init) == config()


@pytest.mark.parametrize("key", ["new_key", "modules_to_save", "use_dora", "alora_invocation_tokens"])
@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_unset_fields_are_ignored(key: str, value: Any) -> None:
    assert config(**{key: value}) == config()


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_qalora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("megatron_config", {"hidden_size": 8}),
        ("alora_invocation_tokens", [5, 6]),
        ("arrow_config", {}),
        ("kasa_config", {}),
        ("monteclora_config", {}),
        ("velora_config", {}),
        ("use_bdlora", {"nblocks": 2}),
        ("use_bdlora", {}),
        ("a_key_of_tomorrow", 1),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "PiSSA"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("peft_type", "IA3"),
        ("peft_type", None),
    ],
)
def test_fields_that_change_numbers_are_refused(key: str, value: Any) -> None:
    error = refusal(**{key: value})
    assert error.location == key
    assert str(error) == f"{key}: {error.message}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("r", value) for value in (0, -1, 8.5, "8", True, None, 10**400)),
        *(("lora_alpha", value) for value in ("16", True, None, math.nan, math.inf, 1e300, 10**400)),
        *(("use_rslora", value) for value in ("true", 1, None)),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", "q_proj"),
    ],
)
def test_numbers_must_be_numbers(key: str, value: Any) -> None:
    assert refusal(**{key: value}).location == key


@pytest.mark.parametrize("value", [0, 2.5, "2", True, None])
def test_ranks_of_patterns_must_be_numbers(value: Any) -> None:
    assert refusal(rank_pattern={"q_proj": value}).location == "rank_pattern.q_proj"


@pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha"])
def test_nothing_is_made_up(key: str) -> None:
    with pytest.raises(AdapterError, match=f"^{key}: it is missing"):
        parse_config(json.dumps({k: v for k, v in PLAIN.items() if k != key}))


@pytest.mark.parametrize(
    "pattern",
    ["(", "[", "a{2,1}", "*", "(?P<x", "\\", "a{99999999999}", "[[a]", "[a--b]", "a*+", "(?=a)a", r"(a)\1"],
)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_no_regular_expression(key: str, pattern: str) -> None:
    error = refusal(**{key: {pattern: 2}})
    assert (error.location, repr(pattern) in error.message) == (key, True)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("pattern", ["(a+)+", "(a|a)*b", ".*.*.*.*.*x", "(.|.)" * 40, "a?" * 40])
def test_patterns_that_backtrack_endlessly_in_python(pattern: str) -> None:
    read = config(rank_pattern={pattern: 3})
    assert {read.rank("a" * length + "!") for length in (40, 1000)} == {8}


def test_long_patterns_are_refused() -> None:
    assert "more than 1000 characters" in refusal(rank_pattern={"x" * 1001: 2}).message


@pytest.mark.parametrize(
    "pattern",
    [
        r"model\.layers\.(\d+)\.self_attn\.(q|k|v|o)_proj",
        r".*\.layers\.([0-9]|1[0-9]|2[0-3])\..*(q|v)_proj",
        rf"model.layers.({'|'.join(map(str, range(64)))}).mlp.*",
        "^model.decoder.layers.0.encoder_attn.k_proj",
    ],
)
def test_patterns_that_people_write_are_not(pattern: str) -> None:
    assert config(rank_pattern={pattern: 2}).rank_pattern == {pattern: 2}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", b"\xff", '"\\ud800"', "\ud800", "[" * 10**5])
def test_no_config(text: str | bytes) -> None:
    with pytest.raises(AdapterError) as caught:
        parse_config(text)
    assert caught.value.location == "adapter_config"


# --- any text ---------------------------------------------------------------------------------------

KEYS = sorted(set(re.findall(r'"(\w+)":', WRITTEN)))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
    max_leaves=6,
)
VALUES = JSON | st.dictionaries(st.text("ab.*(|)[]?+\\{1,}^$", max_size=6), st.integers(1, 9), max_size=2)
CONFIGS = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), VALUES, max_size=3).map(
    lambda drawn: json.dumps({**PLAIN, **drawn})
)


@given(CONFIGS | st.text(st.characters()) | st.binary())
def test_any_text_is_read_or_refused(text: str | bytes) -> None:
    with contextlib.suppress(AdapterError):
        read = parse_config(text)
        assert read.rank("model.layers.0.mlp.up_proj") >= 1
        assert math.isfinite(read.scale("model.layers.0.mlp.up_proj"))


PATTERNS = st.text(st.sampled_from("ab.*+?(|)[]\\{1,}^$wd"), max_size=8)


@given(PATTERNS, st.text(st.sampled_from("ab.1"), max_size=8))
def test_patterns_match_as_in_python(pattern: str, module: str) -> None:
    with contextlib.suppress(AdapterError):
        read = config(rank_pattern={pattern: 3})
        is_match = re.match(rf"(.*\.)?({pattern})$", module) is not None
        assert (read.rank(module) == 3) == (is_match or pattern == module)
