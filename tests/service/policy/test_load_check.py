"""The check that the settings ask for: its length, progress, earlier outcomes, refusals."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from shopr1_service.core import Certainty, CompletionTokens, PromptKey, TokenGroup
from shopr1_service.engine.forward.base import Forward
from shopr1_service.engine.forward.expanded import ExpandedForward
from shopr1_service.engine.forward.self_check import Verdict, choose_forward
from shopr1_service.engine.lm_head import trunk_of
from shopr1_service.errors import PolicyError
from shopr1_service.policy import load_check
from shopr1_service.policy.factory import build_policy
from shopr1_service.policy.load_progress import LoadProgress
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.settings import Settings
from tests.support.models import (
    FAMILIES,
    Reference,
    byte_level,
    llama4,
    policy_of,
    random_ids,
    rules,
    tiny_model,
)

_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 6.0}


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The token ids of each check from now on."""
    seen: list[list[int]] = []

    def spy(
        model: PreTrainedModel, random_ids: list[int], candidates: list[Forward], *report: Any, **unused: Any
    ) -> Verdict:
        seen.append(random_ids)
        return choose_forward(model, random_ids, candidates, *report, **unused)

    monkeypatch.setattr(load_check, "choose_forward", spy)
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
def test_check_notices_what_is_wrong_beyond_a_window(
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

    def change_longer_ones(**options: Any) -> Any:
        output = forward(**options)
        if options.get("past_key_values") is not None and int(options["position_ids"].max()) >= size:
            output.last_hidden_state = output.last_hidden_state * 1.01
        return output

    assert choose_forward(model, checks[0], [ExpandedForward(model)]).forward.name == "expanded"
    monkeypatch.setattr(trunk, "forward", change_longer_ones)
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


def test_the_check_is_short_where_no_sequence_changes_rope(checks: list[list[int]]) -> None:
    policy_of(tiny_model(rope_parameters=_DYNAMIC, max_position_embeddings=200), max_sequence_tokens=None)
    policy_of(tiny_model(rope_parameters=_DYNAMIC, max_position_embeddings=200), max_sequence_tokens=400)
    assert [len(ids) for ids in checks] == [24, 224]


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
    monkeypatch.setattr(load_check, "confirms", lambda *_: False)
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
