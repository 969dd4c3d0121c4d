"""Policies with random weights, made from a config on the device, and groups of random tokens for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.workloads import Shape
from shopr1_rewards import load_recipe
from shopr1_service.core import Certainty, CompletionTokens, PromptKey, TokenGroup, Unmeasurable
from shopr1_service.policy.factory import build_policy
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.settings import Settings, load_settings

RULES = load_recipe("shop_r1").self_certainty

_WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_SMALL: Mapping[str, Any] = {
    "vocab_size": 389,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LARGE: Mapping[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 65_536,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
_EMBEDDING_SCALE = 5.0
"""Scale of the tied head. As initialised, all next-token distributions have almost equal self-certainty."""


@dataclass(frozen=True)
class Family:
    """An architecture in a tiny size."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", {"tie_word_embeddings": True}),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen3_moe": Family("qwen3_moe", _EXPERTS),
    "mistral": Family("mistral", {"sliding_window": 8}),
    "gemma3": Family("gemma3_text", _WINDOW),
}


def tiny_model(family: Family, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this family on the CPU; the weights depend on the seed only."""
    model = random_model(family.kind, {**_SMALL, **family.options}, torch.device("cpu"), torch.float32)
    generator = _generator()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases: their initial 1 and 0 would hide errors
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return on(model, dtype)


def speed_model(device: torch.device, dtype: torch.dtype, *, is_tiny: bool) -> PreTrainedModel:
    """A model of the shape of Qwen2.5-3B, or a tiny one of the same architecture."""
    if is_tiny:
        return random_model("qwen2", {**_SMALL, "tie_word_embeddings": True}, device, dtype)
    model = random_model("qwen2", _LARGE, device, dtype)
    with torch.no_grad():
        cast("nn.Embedding", model.get_input_embeddings()).weight.mul_(_EMBEDDING_SCALE)
    return model


def on(model: PreTrainedModel, target: torch.device | torch.dtype) -> PreTrainedModel:
    """The model, moved or converted in place."""
    nn.Module.to(model, target)
    return model


def random_model(
    kind: str, options: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """A model with random weights, initialised on the device."""
    config = AutoConfig.for_model(kind, **options)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.train(False)
    return model


def random_policy(model: PreTrainedModel, directory: Path) -> LoadedPolicy:
    """A policy of this model without a prefix cache, that takes updates from below the directory."""
    return build_policy(model, byte_tokenizer(), update_settings(model, directory), name="random weights")


def update_settings(model: PreTrainedModel, directory: Path) -> Settings:
    return load_settings(
        {
            "dtype": str(model.dtype).removeprefix("torch."),
            "prefix_cache_bytes": 0,
            "policy_roots": [directory],
            "staging_dir": directory,
            "log_level": "error",
        }
    )


def engine_values(policy: LoadedPolicy, group: TokenGroup) -> Tensor:
    """Self-certainty in nats of every measured token of a group, fp64.

    Raises:
        RuntimeError: a completion was not measured.
    """
    return values_of(policy.certainties([group], RULES))


def values_of(measured: Sequence[Sequence[Certainty | Unmeasurable]]) -> Tensor:
    """Values of all completions in one tensor, fp64.

    Raises:
        RuntimeError: a completion was not measured.
    """
    values: list[float] = []
    for each in (each for group in measured for each in group):
        if not isinstance(each, Certainty):
            raise RuntimeError(f"not measured: {each}")
        values += each.values
    return torch.tensor(values).double()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte. Benchmarks send ids, but a policy needs a tokenizer."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(["<end>", *characters])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")  # type: ignore[no-untyped-call]


def random_ids(num_tokens: int, num_vocab: int, seed: int) -> list[int]:
    ids: list[int] = torch.randint(num_vocab, (num_tokens,), generator=_generator(seed)).tolist()
    return ids


def random_group(shape: Shape, num_vocab: int, seed: int) -> TokenGroup:
    """A group of random tokens whose completions are measured at every token."""
    prompt_ids = random_ids(shape.P, num_vocab, seed)
    completions = [random_ids(shape.R, num_vocab, seed + 1 + i) for i in range(shape.G)]
    return TokenGroup(PromptKey(prompt_ids), [CompletionTokens(ids, range(shape.R)) for ids in completions])


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
