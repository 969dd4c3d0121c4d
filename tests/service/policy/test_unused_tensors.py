"""Checkpoints with tensors that their config has no place for."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from shopr1_service.core import Certainty, CompletionTokens, PromptKey, TokenGroup
from shopr1_service.errors import PolicyError
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.policy.loading import load_policy
from shopr1_service.policy.unused_tensors import refuse_unused
from shopr1_service.settings import Settings
from tests.support.models import MIXTURES, Reference, byte_level, random_ids, rules, tiny_model

GROUP = TokenGroup(PromptKey(random_ids(12, seed=1)), [CompletionTokens(random_ids(8, seed=2), range(8))])
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def saved(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor], **model: Any) -> Path:
    """A checkpoint with changes of its config, and with further tensors."""
    tiny_model(**model).save_pretrained(directory)
    byte_level().save_pretrained(directory)
    weights = safetensors.torch.load_file(directory / "model.safetensors") | tensors
    safetensors.torch.save_file(weights, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | config), "utf-8")
    return directory


def load(directory: Path, *ignored: str) -> LoadedPolicy:
    settings: dict[str, Any] = {"policy": str(directory), "dtype": "float32", "device": "cpu"}
    return load_policy(Settings(**settings, ignored_tensors=ignored))


def values(policy: LoadedPolicy) -> list[float]:
    [[certainty]] = policy.certainties([GROUP], rules())
    assert isinstance(certainty, Certainty)
    return list(certainty.values)


def expected(**model: Any) -> list[float]:
    [completion] = GROUP.completions
    return Reference(tiny_model(**model)).values(
        GROUP.prompt.ids, completion.ids, completion.measured, rules()
    )


UNUSED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "biases": ({"attention_bias": True}, {"attention_bias": False}, ["model.layers.*.bias"]),
    "layers": ({"num_hidden_layers": 3}, {"num_hidden_layers": 2}, ["model.layers.2.*"]),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_tensors_that_the_config_denies_are_refused(tmp_path: Path, kind: str) -> None:
    model, config, patterns = UNUSED[kind]
    directory = saved(tmp_path / "tiny", config, {}, **model)
    with pytest.raises(
        PolicyError, match=r"would not compute with \d tensors of the checkpoint: model\.layers"
    ):
        load(directory)
    assert load(directory, *patterns).info.architecture == "LlamaForCausalLM"


def test_further_head_is_refused_unless_ignored(tmp_path: Path) -> None:
    directory = saved(tmp_path / "tiny", {}, {"v_head.summary.weight": torch.ones(1, 32)})
    with pytest.raises(PolicyError, match=r"1 tensors of the checkpoint: v_head\.summary\.weight\."):
        load(directory)
    assert values(load(directory, "v_head.*")) == pytest.approx(expected(), abs=1e-4)


def test_buffers_of_former_versions_are_not_weights(tmp_path: Path) -> None:
    buffers = {FREQUENCIES: (1e4 ** -(torch.arange(4) / 4)).half()}
    assert values(load(saved(tmp_path / "tiny", {}, buffers))) == pytest.approx(expected(), abs=1e-4)
    names = ["transformer.h.0.attn.bias", "layers.0.attention.masked_bias", "blk.0.attn_rot_embd.weight"]
    refuse_unused(names, ())
    with pytest.raises(PolicyError, match="q_proj"):
        refuse_unused(["model.layers.0.self_attn.q_proj.bias"], ())


def test_frequencies_that_contradict_the_config_are_refused_unless_ignored(tmp_path: Path) -> None:
    """As of a model whose config was copied from another one."""
    directory = saved(tmp_path / "tiny", {}, {FREQUENCIES: 5e5 ** -(torch.arange(4) / 4)})
    with pytest.raises(PolicyError, match=rf"tensor {FREQUENCIES} of the checkpoint: .* rotary frequencies"):
        load(directory)
    assert values(load(directory, "*.inv_freq")) == pytest.approx(expected(), abs=1e-4)


# --- other places ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_with_a_gap_are_refused(tmp_path: Path, name: str) -> None:
    """Transformers would take the last expert for the second, and report nothing."""
    mixture = MIXTURES[name]
    tiny_model(mixture.kind, **mixture.options).save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    renamed = {key.replace(".experts.1.", ".experts.9."): tensor for key, tensor in weights.items()}
    assert renamed.keys() != weights.keys()
    safetensors.torch.save_file(renamed, file, {"format": "pt"})
    with pytest.raises(PolicyError, match=r"experts\.0\..* these are not the 4 tensors from 0 on"):
        load(tmp_path)


def test_same_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    """Transformers would take one of them."""
    further = {f"module.{HEAD}": torch.ones(tiny_model().config.vocab_size, 32)}
    directory = saved(tmp_path / "tiny", {}, further)
    with pytest.raises(PolicyError, match=r"duplicate tensor: it is (module\.)?lm_head\.weight again"):
        load(directory)


# --- ties --------------------------------------------------------------------------------------------


def test_head_that_contradicts_the_config_is_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path / "tiny", {"tie_word_embeddings": True}, {})
    with pytest.raises(PolicyError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        load(directory)


def test_ignored_head_is_tied(tmp_path: Path) -> None:
    head = torch.randn(tiny_model().config.vocab_size, 32)
    directory = saved(tmp_path / "tiny", {}, {HEAD: head}, tie_word_embeddings=True)
    policy = load(directory, HEAD)
    assert policy.weights.aliases == {HEAD: EMBEDDING}
    assert values(policy) == pytest.approx(expected(tie_word_embeddings=True), abs=1e-4)


def test_equal_head_is_tied(tmp_path: Path) -> None:
    embedding = tiny_model(tie_word_embeddings=True).get_parameter(EMBEDDING)
    directory = saved(tmp_path / "tiny", {}, {HEAD: embedding.data.clone()}, tie_word_embeddings=True)
    assert values(load(directory)) == pytest.approx(expected(tie_word_embeddings=True), abs=1e-4)
