"""Time of a group by architecture: the prompt read in place, against one row with a mask.

Random models of one size, as large as SmolLM2-135M without its vocabulary. Each architecture is also compared
with the Llama of this size, which has plain attention.

    python -m benchmarks.engine.families
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.meters import interleaved_s
from benchmarks.report import Report
from benchmarks.workloads import Shape
from shopr1_service.engine.forward.base import Forward, IndependentForward, Suffix
from shopr1_service.engine.forward.expanded import ExpandedForward
from shopr1_service.engine.forward.packed import PackedForward
from shopr1_service.engine.forward.shared_prefix import SharedPrefixForward
from shopr1_service.engine.prefix_cache import PrefixCache

HERE = Path(__file__).parent
NUM_ROUNDS = 5
_SIZES = {
    "vocab_size": 1024,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 65_536,
    "pad_token_id": 0,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 4
_WINDOW = {"sliding_window": 1024}


@dataclass(frozen=True)
class Architecture:
    """A `model_type` and what differs from a plain config of this size."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> PreTrainedModel:
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.kind, **{**_SIZES, **self.options})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        model.train(False)
        return model  # type: ignore[no-any-return]


_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 768}
_LATENT = {
    "num_key_value_heads": 9,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "head_dim": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "first_k_dense_replace": 8,  # no experts: the attention is compared
}
ARCHITECTURES = (
    Architecture("mistral", _WINDOW),
    Architecture("phi3", _WINDOW),
    Architecture("gemma2", {**_WINDOW, "layer_types": _ALTERNATING}),
    Architecture("gemma3_text", {**_WINDOW, "layer_types": _ALTERNATING}),
    Architecture("olmo3", {**_WINDOW, "layer_types": _ALTERNATING}),
    Architecture("gpt_oss", {**_WINDOW, **_EXPERTS, "layer_types": _ALTERNATING}),
    Architecture("deepseek_v3", _LATENT),
)
_STATES = {"mamba_n_heads": 18, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1}
_LINEAR = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2
HYBRIDS = (
    Architecture("lfm2", {"layer_types": ["conv", "full_attention"] * 4}),
    Architecture("bamba", {"attn_layer_indices": [3, 7], **_STATES}),
    Architecture("falcon_h1", {"mamba_d_ssm": 1152, **_STATES}),
    Architecture(
        "qwen3_next",
        {
            "layer_types": _LINEAR,
            "linear_num_value_heads": 9,
            "linear_num_key_heads": 9,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 768,
            "shared_expert_intermediate_size": 768,
        },
    ),
)
"""Recurrent states and convolutions: each completion runs on a copy of the prompt's cache."""


class Measured:
    """One strategy of one model, run on groups of a shape.

    Args:
        cache: emptied before each new prompt.
    """

    def __init__(self, forward: Forward, shape: Shape, cache: PrefixCache | None = None) -> None:
        self._forward, self._shape, self._cache = forward, shape, cache
        self._prompt_ids = _ids(shape.P, seed=0)
        self._suffixes = [Suffix(_ids(shape.R, seed=1 + i), range(-1, shape.R)) for i in range(shape.G)]

    def run_new_prompt(self) -> None:
        if self._cache is not None:
            self._cache.clear()
        self.run_again()

    def run_again(self) -> None:
        self._forward.hidden_states(self._prompt_ids, self._suffixes)


def measure(architecture: Architecture, llama: PreTrainedModel, shape: Shape, report: Report) -> None:
    """Times of the shared prefix, of the packed row before it, and of the Llama of this size."""
    model, name = architecture.build(), architecture.kind
    cache, llama_cache = PrefixCache(2 * 2**30), PrefixCache(2 * 2**30)
    shared = Measured(SharedPrefixForward(model, cache), shape, cache)
    packed = Measured(PackedForward(model), shape)
    plain = Measured(SharedPrefixForward(llama, llama_cache), shape, llama_cache)
    shared_s, packed_s, llama_s = interleaved_s(
        NUM_ROUNDS, shared.run_new_prompt, packed.run_new_prompt, plain.run_new_prompt
    )
    again_s, packed_again_s = interleaved_s(NUM_ROUNDS, shared.run_again, packed.run_again)
    report.add(shape, f"{name} shared_prefix", shared_s, "s")
    report.add(shape, f"{name} packed / shared_prefix", packed_s / shared_s, "x")
    report.add(shape, f"{name} the same prompt again", packed_again_s / again_s, "x")
    report.add(shape, f"{name} shared_prefix / llama", shared_s / llama_s, "x")


def measure_hybrid(architecture: Architecture, shape: Shape, report: Report) -> None:
    """Time on copies of the prompt's cache, against each completion with its whole prompt."""
    model = architecture.build()
    expanded = Measured(ExpandedForward(model), shape)
    independent = Measured(IndependentForward(model), shape)
    expanded_s, independent_s = interleaved_s(NUM_ROUNDS, expanded.run_again, independent.run_again)
    report.add(shape, f"{architecture.kind} expanded", expanded_s, "s")
    report.add(shape, f"{architecture.kind} independent / expanded", independent_s / expanded_s, "x")


def _ids(num: int, *, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(3, _SIZES["vocab_size"], (num,), generator=generator).tolist()
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--tiny", action="store_true", help="a small shape, only to show that everything works"
    )
    parser.add_argument("--output", type=Path, default=HERE)
    arguments = parser.parse_args()
    shape = Shape(40, 2, 8) if arguments.tiny else Shape(4000, 8, 64)
    report = Report(torch.device("cpu"), "float32")
    llama = Architecture("llama").build()
    for architecture in ARCHITECTURES:
        measure(architecture, llama, shape, report)
    for architecture in HYBRIDS:  # slow on a CPU: a shorter prompt
        measure_hybrid(architecture, Shape(min(shape.P, 1000), shape.G, shape.R), report)
    report.write(arguments.output / "families.csv")


if __name__ == "__main__":
    main()
