"""The file of outcomes: what its key depends on, damaged files, several writers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from shopr1_service.engine.forward.base import IndependentForward
from shopr1_service.engine.forward.self_check import Cause, Rejection, Verdict
from shopr1_service.policy import verdict_cache
from shopr1_service.policy.verdict_cache import KnownVerdict, VerdictCache, verdict_key
from tests.support.models import tiny_model

KNOWN = KnownVerdict(
    forward="expanded", rejected=(("shared_prefix", Cause.DIFFERS, "by 0.5"),), remarks=("a remark",)
)


def test_another_process_reads_the_outcomes(tmp_path: Path) -> None:
    file = tmp_path / "new" / "outcomes.json"
    assert VerdictCache(file).get("a") is None
    VerdictCache(file).put("a", KNOWN)
    VerdictCache(file).put("b", KnownVerdict(forward="expanded"))
    assert VerdictCache(file).get("a") == KNOWN
    assert VerdictCache(file).get("b") == KnownVerdict(forward="expanded")
    assert [path.name for path in file.parent.iterdir()] == ["outcomes.json"]


def test_a_verdict_becomes_an_outcome() -> None:
    rejection = Rejection("shared_prefix", Cause.DIFFERS, "by 0.5")
    verdict = Verdict(IndependentForward(tiny_model()), (rejection,), ("a remark",), feeds_whole=True)
    known = KnownVerdict.of(verdict)
    assert known.model_copy(update={"forward": "expanded", "feeds_whole": False}) == KNOWN
    assert known.forward == "independent"
    assert known.verdict(verdict.forward) == verdict


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": {"forward": "own", "more": 1}}', "\0"])
def test_a_damaged_file_is_ignored_and_replaced(tmp_path: Path, text: str) -> None:
    file = tmp_path / "outcomes.json"
    file.write_text(text)
    assert VerdictCache(file).get("a") is None
    VerdictCache(file).put("a", KNOWN)
    assert VerdictCache(file).get("a") == KNOWN


def test_a_place_that_cannot_be_written_to_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    VerdictCache(blocked / "outcomes.json").put("a", KNOWN)
    assert "cannot be kept" in caplog.text


def test_a_failed_write_keeps_the_old_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "outcomes.json"
    VerdictCache(file).put("a", KNOWN)

    def full(*_args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    VerdictCache(file).put("b", KNOWN)
    assert set(json.loads(file.read_text())) == {"a"}
    assert [path.name for path in tmp_path.iterdir()] == ["outcomes.json"]


def test_the_oldest_outcomes_are_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verdict_cache, "_MAX_ENTRIES", 2)
    outcomes = VerdictCache(tmp_path / "outcomes.json")
    for key in ("a", "b", "a", "c"):
        outcomes.put(key, KNOWN)
    assert [outcomes.get(key) is not None for key in "abc"] == [True, False, True]


# --- the key ----------------------------------------------------------------------------------------


def test_the_key_does_not_depend_on_the_weights() -> None:
    one, other = tiny_model("mistral"), tiny_model("mistral")
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    other.config._name_or_path = "elsewhere"
    assert verdict_key(one, 100) == verdict_key(other, 100)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_model("mistral", sliding_window=9),
        lambda: tiny_model("mistral", num_hidden_layers=3),
        lambda: tiny_model("mistral", torch.float64),
        lambda: tiny_model("llama"),
    ],
)
def test_the_key_depends_on_config_and_architecture(make: Callable[[], PreTrainedModel]) -> None:
    assert verdict_key(make(), 100) != verdict_key(tiny_model("mistral"), 100)


def test_the_key_depends_on_software_attention_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mistral")
    model.set_attn_implementation("sdpa")
    keys = {"as it is": verdict_key(model, 100), "length": verdict_key(model, 101)}
    with monkeypatch.context() as patch:
        patch.setattr("shopr1_service.policy.verdict_cache.software_digest", lambda: "other")
        keys["software"] = verdict_key(model, 100)
    model.set_attn_implementation("eager")
    keys["attention"] = verdict_key(model, 100)
    assert len(set(keys.values())) == len(keys), keys
