"""Building a policy: limits, checks, end tokens, warm-up and memory, on a CPU with a GPU's numbers."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

from shopr1_client.wire import Message
from shopr1_service.core import Certainty, CompletionTokens, PromptKey, TokenGroup
from shopr1_service.engine.engine import Engine
from shopr1_service.engine.forward.base import Forward, IndependentForward, PromptGroup
from shopr1_service.engine.forward.expanded import ExpandedForward
from shopr1_service.engine.forward.self_check import Verdict, choose_forward
from shopr1_service.engine.lm_head import LinearHead, trunk_of
from shopr1_service.errors import PolicyError
from shopr1_service.policy import factory
from shopr1_service.policy.factory import (
    CPU_PREFIX_CACHE_BYTES,
    WARM_UP_SHAPES,
    build_policy,
    prefix_cache_bytes,
    warm_up,
)
from shopr1_service.policy.load_progress import LoadProgress
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.settings import Settings
from tests.support.models import (
    FAMILIES,
    NUM_ROWS,
    NUM_TOKENS,
    Reference,
    byte_level,
    head_of,
    llama4,
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


def test_the_check_is_short_where_no_sequence_changes_rope(checks: list[list[int]]) -> None:
    policy_of(tiny_model(rope_parameters=_DYNAMIC, max_position_embeddings=200), max_sequence_tokens=None)
    policy_of(tiny_model(rope_parameters=_DYNAMIC, max_position_embeddings=200), max_sequence_tokens=400)
    assert [len(ids) for ids in checks] == [24, 224]


def test_rope_that_cannot_be_controlled_is_a_policy_error() -> None:
    model = tiny_model(rope_parameters=_DYNAMIC)
    cast("Any", trunk_of(model)).rotary_emb.forward = lambda _x, _positions, _frames: None
    with pytest.raises(
        PolicyError, match="the RoPE of LlamaRotaryEmbedding depends on the sequence's length"
    ):
        policy_of(model)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The token ids of each check from now on."""
    seen: list[list[int]] = []

    def spy(
        model: PreTrainedModel, random_ids: list[int], candidates: list[Forward], *report: Any, **unused: Any
    ) -> Verdict:
        seen.append(random_ids)
        return choose_forward(model, random_ids, candidates, *report, **unused)

    monkeypatch.setattr(factory, "choose_forward", spy)
    return seen


def test_check_is_longer_than_the_window(checks: list[list[int]]) -> None:
    policy_of(tiny_model("mistral", sliding_window=40))
    policy_of(tiny_model("llama"))
    assert [len(ids) for ids in checks] == [64, 24]


def test_check_is_no_longer_than_what_is_scored(checks: list[list[int]]) -> None:
    # A window that no sequence fills cannot show. The shortest check does not depend on the setting.
    for limit in (3000, 1010, 990, 50, 10):
        policy_of(tiny_model("mistral", sliding_window=1000), max_sequence_tokens=limit)
    assert [len(ids) for ids in checks] == [1024, 1010, 990, 50, 24]


@pytest.mark.parametrize(
    ("family", "name"),
    [("gpt_neo", "window_size"), ("mamba2", "chunk_size"), ("bamba", "mamba_chunk_size")],
)
def test_check_is_longer_than_the_reach_of_other_architectures(
    checks: list[list[int]], family: str, name: str
) -> None:
    model = tiny_model(FAMILIES[family].kind, **{**FAMILIES[family].options, name: 40})
    assert policy_of(model).info.forward == FAMILIES[family].forward
    assert [len(ids) for ids in checks] == [64]


@pytest.mark.parametrize("size", [8, 18, 40, 100])
@pytest.mark.parametrize("kind", ["sliding_attention", "chunked_attention"])
def test_check_notices_that_a_window_is_ignored(
    monkeypatch: pytest.MonkeyPatch, checks: list[list[int]], kind: str, size: int
) -> None:
    # Completions begin 18 tokens after a multiple of the size: with size 18 the prompt ends with a chunk.
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

    assert choose_forward(model, checks[0], [ExpandedForward(model)]).forward.name == "expanded"
    monkeypatch.setattr(trunk, "forward", ignore_the_window)
    assert choose_forward(model, checks[0], [ExpandedForward(model)]).forward.name == "independent"


def test_ties_are_broken_as_in_the_full_forward() -> None:
    # It keeps 24 keys by their values, which in the first layer depend on the token alone.
    model = tiny_model("doge", keep_window_size=24, head_dim=8)
    reference, policy = Reference(model), policy_of(model)
    prompt_ids = random_ids(90, below=20)
    completions = [CompletionTokens(random_ids(60, seed=seed, below=20), range(3, 9)) for seed in (1, 2)]
    [measured] = policy.certainties([TokenGroup(PromptKey(prompt_ids), completions)], rules())
    for completion, certainty in zip(completions, measured, strict=True):
        assert isinstance(certainty, Certainty)
        expected = reference.values(prompt_ids, completion.ids, completion.measured, rules())
        assert certainty.values == pytest.approx(expected, rel=0, abs=1e-4)
    info = policy.info
    [remark] = info.remarks
    assert remark.startswith("its choice of 24 keys for each token breaks ties by the sequence's length")
    assert info.forward == "independent"


def test_an_encoder_is_a_policy_error() -> None:
    with pytest.raises(PolicyError, match="BertLMHeadModel is not causal"):
        policy_of(tiny_model("bert", is_decoder=False))


def test_info_says_why_slower_paths_were_taken() -> None:
    info = policy_of(model_of("falcon")).info
    [rejected] = info.rejected_paths
    assert (info.forward, rejected.path, rejected.reason) == ("expanded", "shared_prefix", "unsupported")
    assert "TypeError" in rejected.detail
    assert policy_of(tiny_model("llama")).info.rejected_paths == ()
    info = policy_of(tiny_model("electra", is_decoder=True, embedding_size=16)).info
    assert (info.head, info.rejected_paths[0].path) == ("module", "linear")
    assert "LinearHead fails" in info.rejected_paths[0].detail


# --- the long check ---------------------------------------------------------------------------------


def wide(**settings: Any) -> LoadedPolicy:
    return policy_of(tiny_model("mistral", sliding_window=200), **settings)


def test_a_short_check_is_a_remark(checks: list[list[int]]) -> None:
    assert wide(self_check="short").info.remarks == ("checked up to 64 tokens of 224: self_check is short",)
    assert wide().info.remarks == ()
    assert [len(ids) for ids in checks] == [64, 224]


def test_a_known_outcome_is_only_confirmed(checks: list[list[int]], tmp_path: Path) -> None:
    first, second = (wide(cache_dir=tmp_path, cache_bytes=1).info for _ in range(2))
    assert first == second
    assert first.forward == "shared_prefix"
    assert [len(ids) for ids in checks] == [224]


def test_a_known_outcome_that_is_not_confirmed_is_checked_again(
    monkeypatch: pytest.MonkeyPatch, checks: list[list[int]], tmp_path: Path
) -> None:
    expected = wide(cache_dir=tmp_path, cache_bytes=1).info
    monkeypatch.setattr(factory, "confirms", lambda *_: False)
    assert wide(cache_dir=tmp_path, cache_bytes=1).info == expected
    assert [len(ids) for ids in checks] == [224, 224]


def test_a_strategy_that_is_gone_is_no_known_outcome(checks: list[list[int]], tmp_path: Path) -> None:
    file = tmp_path / "self_check.json"
    expected = wide(cache_dir=tmp_path, cache_bytes=1).info
    file.write_text(file.read_text().replace("shared_prefix", "of_a_later_version"))
    assert wide(cache_dir=tmp_path, cache_bytes=1).info == expected
    assert [len(ids) for ids in checks] == [224, 224]
    assert "shared_prefix" in file.read_text()


def test_outcomes_of_the_short_check_are_others(checks: list[list[int]], tmp_path: Path) -> None:
    cache: dict[str, Any] = {"cache_dir": tmp_path, "cache_bytes": 1}
    infos = [wide(self_check=extent, **cache).info for extent in ("short", "full", "short", "full")]
    assert [len(ids) for ids in checks] == [64, 224]
    assert infos[:2] == infos[2:]
    assert [len(info.remarks) for info in infos] == [1, 0, 1, 0]


def test_a_check_that_depends_on_weights_is_run_at_every_start(
    checks: list[list[int]], tmp_path: Path
) -> None:
    """Another checkpoint of this architecture may have ties between the keys that it chooses."""
    for _ in range(2):
        policy_of(tiny_model("doge", keep_window_size=24, head_dim=8), cache_dir=tmp_path, cache_bytes=1)
    assert len(checks) == 2
    assert not (tmp_path / "self_check.json").exists()


def test_progress_of_the_long_check_is_shown() -> None:
    notes: list[str] = []

    class Progress(LoadProgress):
        def note(self, detail: str) -> None:
            notes.append(detail)

    model = tiny_model("mistral", sliding_window=200)
    build_policy(model, byte_level(), Settings(), name="tiny", startup=Progress())
    assert notes == ["independent, 219 tokens", "independent, 224 tokens", "shared_prefix, 213 tokens"]


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


# --- memory -----------------------------------------------------------------------------------------

GIB = 2**30


@pytest.mark.parametrize(
    ("peak_gib", "memory_share", "expected_gib"),
    [(30, 0.5, 10), (40, 0.5, 0), (50, 0.5, 0), (10, 0.9, 62), (0, 1.0, 80)],
)
def test_prefix_cache_gets_the_memory_that_is_left(
    monkeypatch: pytest.MonkeyPatch, peak_gib: int, memory_share: float, expected_gib: int
) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(total_memory=80 * GIB)
    )
    num_bytes = prefix_cache_bytes(torch.device("cuda"), memory_share, peak_bytes=peak_gib * GIB)
    assert num_bytes == expected_gib * GIB


def test_prefix_cache_has_a_fixed_size_on_a_cpu() -> None:
    assert prefix_cache_bytes(torch.device("cpu"), 0.9, peak_bytes=10**12) == CPU_PREFIX_CACHE_BYTES


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (10, []),
        (40, [(8, 8, 32)]),
        (200, [(128, 8, 32), (136, 8, 64), (72, 16, 128), (72, 16, 128)]),
        (10**6, list(WARM_UP_SHAPES)),
    ],
)
def test_warm_up_runs_each_shape(max_tokens: int, expected: list[tuple[int, int, int]]) -> None:
    seen = []

    class RecordingForward(IndependentForward):
        def batch(self, groups: Sequence[PromptGroup]) -> list[list[torch.Tensor]]:
            [group] = groups
            assert len(set(group.suffixes)) == len(group.suffixes)  # each is computed
            own = {len(suffix.ids) + 1 for suffix in group.suffixes}
            assert len(own) == 1
            seen.append((len(group.prompt_ids), len(group.suffixes), own.pop()))
            return [[torch.zeros(len(s.positions), 32) for s in group.suffixes]]

    model = tiny_model()
    head = LinearHead(torch.zeros_like(head_of(model).weight)[:, :32])
    engine = Engine(
        RecordingForward(model), head, max_sequence_tokens=max_tokens, num_tokenizer_tokens=NUM_TOKENS
    )
    warm_up(engine, range(3, 43), rules(), max_tokens=max_tokens)
    # A shape that is too long for the policy is run with a shorter prompt.
    assert [shape for shape in seen if shape[0] > 0] == expected
