"""Building a policy: limits, RoPE that depends on the length, rejected paths, end tokens, templates."""

import copy
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from shopr1_client.wire import Message
from shopr1_service.core import Certainty, CompletionTokens, PromptKey, TokenGroup
from shopr1_service.engine.lm_head import trunk_of
from shopr1_service.errors import PolicyError
from shopr1_service.policy.factory import build_policy
from shopr1_service.settings import Settings
from tests.support.models import (
    NUM_ROWS,
    Reference,
    byte_level,
    head_of,
    model_of,
    policy_of,
    random_ids,
    rules,
    tiny_model,
)

GROUP = TokenGroup(PromptKey(random_ids(12, seed=1)), [CompletionTokens(random_ids(8, seed=2), [0, 5])])


def test_model_of_nan_is_a_policy_error() -> None:
    model = tiny_model()
    with torch.no_grad():
        head_of(model).weight[7] = math.nan
    with pytest.raises(PolicyError, match="logits of LlamaForCausalLM"):
        policy_of(model)


# --- limits and checks -------------------------------------------------------------------------------


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
    with pytest.raises(
        PolicyError, match="the policy declares no maximum sequence length; set max_sequence_tokens"
    ):
        policy_of(LIMITS["bloom"](), max_sequence_tokens=None)


@pytest.mark.parametrize("limit", [1, 6, 7, 25])
def test_a_policy_loads_with_a_short_limit(limit: int) -> None:
    policy = policy_of(tiny_model(), max_sequence_tokens=limit)
    assert policy.info.max_sequence_tokens == limit
    [[certainty]] = policy.certainties([TokenGroup(PromptKey([5]), [CompletionTokens([6], [0])])], rules())
    assert isinstance(certainty, Certainty)


_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 6.0}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("kind", "options", "forward"),
    [
        ("llama", {"rope_parameters": _DYNAMIC, "max_position_embeddings": 16}, "shared_prefix"),
        ("internlm3", {"rope_parameters": _DYNAMIC, "head_dim": 8}, "shared_prefix"),
        # Labelled `dynamic`, but with a fixed base.
        (
            "hunyuan_v1_dense",
            {"rope_parameters": {**_DYNAMIC, "alpha": 1000.0}, "head_dim": 8},
            "shared_prefix",
        ),
        ("llama", {"rope_parameters": _LONG_ROPE}, "shared_prefix"),
        ("phi3", {"rope_parameters": _LONG_ROPE, "original_max_position_embeddings": 16}, "shared_prefix"),
        ("mistral", {"rope_parameters": _LONG_ROPE, "sliding_window": 8}, "shared_prefix"),
    ],
)
def test_prompts_are_shared_where_rope_depends_on_the_length(
    kind: str, options: dict[str, Any], forward: str
) -> None:
    model = tiny_model(kind, **options)
    untouched = copy.deepcopy(model)
    policy = policy_of(model)
    assert policy.info.forward == forward
    for num_prompt_tokens in (8, 4, 30, 8, 4, 12):  # 8 end at the limit
        prompt_ids, ids = random_ids(num_prompt_tokens, seed=1), random_ids(8, seed=2)
        group = TokenGroup(PromptKey(prompt_ids), [CompletionTokens(ids, [0, 2])])
        [[certainty]] = policy.certainties([group], rules())
        expected = Reference(untouched).values(prompt_ids, ids, [0, 2], rules())
        assert isinstance(certainty, Certainty)
        assert certainty.values == pytest.approx(expected, rel=0, abs=1e-4)


def test_rope_that_cannot_be_controlled_is_a_policy_error() -> None:
    model = tiny_model(rope_parameters=_DYNAMIC)
    cast("Any", trunk_of(model)).rotary_emb.forward = lambda _x, _positions, _frames: None
    with pytest.raises(
        PolicyError, match="the RoPE of LlamaRotaryEmbedding depends on the sequence's length"
    ):
        policy_of(model)


def test_info_says_why_slower_paths_were_taken() -> None:
    info = policy_of(model_of("falcon")).info
    [rejected] = info.rejected_paths
    assert (info.forward, rejected.path, rejected.reason) == ("expanded", "shared_prefix", "unsupported")
    assert "TypeError" in rejected.detail
    assert info.attention == "model"
    info = policy_of(tiny_model("llama")).info
    assert (info.head, info.attention, info.rejected_paths) == ("linear", "cpu_flash", ())
    info = policy_of(tiny_model("electra", is_decoder=True, embedding_size=16)).info
    assert (info.head, info.rejected_paths[0].path) == ("module", "linear")
    assert "LinearHead fails" in info.rejected_paths[0].detail


def test_end_tokens_are_those_of_model_and_tokenizer() -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = [1, 2]
    assert set(policy_of(model).codec.end_tokens) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    model.generation_config.eos_token_id = None
    assert set(policy_of(model).codec.end_tokens) == {"<|im_end|>", "<|endoftext|>"}


def test_tokens_beyond_the_embedding_are_named_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    policy_of(tiny_model())
    assert "no embedding" not in caplog.text
    tokenizer = byte_level()
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(NUM_ROWS - len(tokenizer) + 2)])
    policy = build_policy(tiny_model(), tokenizer, Settings(), name="tiny")
    assert (
        f"has 2 tokens that the policy has no embedding for, from '<extra_{NUM_ROWS - 371}>'" in caplog.text
    )
    assert max(policy.codec.encode_ids("<extra_18>")) == NUM_ROWS


def test_templates_of_the_settings_are_used(tmp_path: Path) -> None:
    (tmp_path / "plain.jinja").write_text("{{ messages[0].content }}{{ suffix }}", "utf-8")
    settings: dict[str, Any] = {
        "chat_templates": (tmp_path / "plain.jinja",),
        "chat_template_kwargs": {"suffix": "!"},
    }
    policy = build_policy(
        tiny_model(), byte_level(), Settings(**settings, chat_template="plain"), name="tiny"
    )
    message = Message(role="user", content="hi")
    assert policy.codec.encode_chat([message]) == policy.codec.encode_ids("hi!")
    with pytest.raises(PolicyError, match="no chat template 'other'"):
        build_policy(tiny_model(), byte_level(), Settings(**settings, chat_template="other"), name="tiny")


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
