"""Time of a group by architecture, against slower strategies and against the Llama of this size.

Random models as wide as SmolLM2-135M, without its vocabulary, of 4 layers. With `--base`, the strategies that
these architectures had before take part, too.

    python -m benchmarks.engine.families [--base CHECKOUT] [NAME …]
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.meters import interleaved_s
from benchmarks.report import Report
from benchmarks.workloads import Shape
from shopr1_service.engine.forward.base import (
    MAX_PASS_TOKENS,
    Forward,
    IndependentForward,
    Suffix,
    batches,
)
from shopr1_service.engine.forward.branched import BranchedForward, has_states
from shopr1_service.engine.forward.expanded import SteppedForward
from shopr1_service.engine.forward.prefill import Ids, PrefilledForward
from shopr1_service.engine.forward.shared_prefix import SharedPrefixForward
from shopr1_service.engine.prefix_cache import PrefixCache

HERE = Path(__file__).parent
NUM_ROUNDS = 5
Strategies = Mapping[str, Callable[[PreTrainedModel], Forward]]
_SIZES = {
    "vocab_size": 1024,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 65_536,
    "pad_token_id": 0,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_WINDOW = {"sliding_window": 1024}


_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 768}
_LATENT = {
    "num_key_value_heads": 9,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "head_dim": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "first_k_dense_replace": 4,  # no experts: the attention is compared
}
_STATES = {"mamba_n_heads": 18, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1}
_LINEAR = {
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
    "linear_num_value_heads": 9,
    "linear_num_key_heads": 9,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}


@dataclass(frozen=True)
class Architecture:
    """A `model_type` and what differs from a plain config of this size.

    Attributes:
        before: its strategy in the older checkout.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    before: str = "packed"

    def build(self) -> PreTrainedModel:
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.kind, **{**_SIZES, **self.options})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        model.train(False)
        return model  # type: ignore[no-any-return]


ARCHITECTURES = (
    Architecture("mistral", _WINDOW),
    Architecture("phi3", _WINDOW),
    Architecture("gemma2", {**_WINDOW, "layer_types": _ALTERNATING}),
    Architecture("gemma3_text", {**_WINDOW, "layer_types": _ALTERNATING}),
    Architecture("olmo3", {**_WINDOW, "layer_types": _ALTERNATING}),
    Architecture("gpt_oss", {**_WINDOW, **_EXPERTS, "layer_types": _ALTERNATING}),
    Architecture("deepseek_v3", _LATENT),
    # Recurrent states and convolutions.
    Architecture("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "expanded"),
    Architecture("bamba", {"attn_layer_indices": [3], **_STATES}, "expanded"),
    Architecture("falcon_h1", {"mamba_d_ssm": 1152, **_STATES}, "expanded"),
    Architecture(
        "granitemoehybrid",
        {
            "layer_types": [*["mamba"] * 3, "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 1536,
            **_STATES,
        },
        "expanded",
    ),
    Architecture(
        "nemotron_h",
        {
            "layers_block_type": [*["linear_attention"] * 3, "full_attention"],
            "mamba_num_heads": 18,
            "mamba_head_dim": 64,
            "ssm_state_size": 64,
            "n_groups": 1,
        },
        "expanded",
    ),
    Architecture(
        "mamba2",
        {"num_heads": 18, "head_dim": 64, "expand": 2, "state_size": 64, "n_groups": 1},
        "expanded",
    ),
    Architecture("qwen3_5_text", _LINEAR, "expanded"),
    Architecture(
        "qwen3_next",
        {
            **_LINEAR,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 768,
            "shared_expert_intermediate_size": 768,
        },
        "expanded",
    ),
    Architecture("mamba", {"state_size": 16}, "independent"),
    Architecture(
        "jamba",
        {"attn_layer_period": 4, "attn_layer_offset": 3, "num_experts": 1, "mamba_dt_rank": 36},
        "independent",
    ),
)


class Measured:
    """One strategy of one model, run on groups of a shape.

    Args:
        cache: emptied before each new prompt.
    """

    def __init__(self, forward: Forward, shape: Shape, cache: PrefixCache | None = None) -> None:
        self.name = forward.name
        self._forward, self._shape, self._cache = forward, shape, cache
        self._prompt_ids = _ids(shape.P, seed=0)
        self._suffixes = [Suffix(_ids(shape.R, seed=1 + i), range(-1, shape.R)) for i in range(shape.G)]

    def run_new_prompt(self) -> None:
        if self._cache is not None:
            self._cache.clear()
        self.run_again()

    def run_again(self) -> None:
        self._forward.hidden_states(self._prompt_ids, self._suffixes)


def chosen(architecture: Architecture, model: PreTrainedModel, shape: Shape) -> Measured:
    """The strategy that the check at load chooses."""
    cache = PrefixCache(2 * 2**30)
    if architecture.before == "independent":
        return Measured(SteppedForward(model), shape)
    is_recurrent = has_states(model)
    forward = BranchedForward(model, cache) if is_recurrent else SharedPrefixForward(model, cache)
    return Measured(forward, shape, cache)


def old_strategies(checkout: Path) -> Strategies:
    """The strategies of commit 9d53105, whose modules had no folders, on the base classes of this version."""
    folder = checkout / "service/shopr1_service"
    bases = SimpleNamespace(
        Ids=Ids, PrefilledForward=PrefilledForward, batches=batches, MAX_PASS_TOKENS=MAX_PASS_TOKENS
    )
    for name in ("prefilled_forward", "shared_forward"):
        sys.modules[f"shopr1_service.{name}"] = bases  # type: ignore[assignment]
    return {
        "packed": _module(folder / "packed_forward.py").PackedForward,
        "expanded": _module(folder / "expanded_forward.py").ExpandedForward,
    }


def _module(file: Path) -> Any:  # noqa: ANN401  # another version's code
    spec = importlib.util.spec_from_file_location(f"old_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def measure(
    architecture: Architecture, old: Strategies, llama: PreTrainedModel, shape: Shape, report: Report
) -> None:
    """Times of a new prompt and of the same again, and of other strategies and the Llama of this size."""
    model, cache = architecture.build(), PrefixCache(2 * 2**30)
    own, plain = chosen(architecture, model, shape), Measured(SharedPrefixForward(llama, cache), shape, cache)
    rivals = [Measured(old[architecture.before](model), shape)] if architecture.before in old else []
    if has_states(model):
        rivals.append(Measured(IndependentForward(model), shape))
    calls = [own.run_new_prompt, own.run_again, plain.run_new_prompt, *(rival.run_again for rival in rivals)]
    new_s, again_s, llama_s, *rivals_s = interleaved_s(NUM_ROUNDS, *calls)
    name = f"{architecture.kind} {own.name}"
    report.add(shape, name, new_s, "s")
    report.add(shape, f"{name} / llama", new_s / llama_s, "x")
    for rival, rival_s in zip(rivals, rivals_s, strict=True):
        report.add(shape, f"{architecture.kind} {rival.name} / {own.name}", rival_s / new_s, "x")
        report.add(shape, f"{architecture.kind} the same, prompt known", rival_s / again_s, "x")


def _ids(num: int, *, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(3, _SIZES["vocab_size"], (num,), generator=generator).tolist()
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="architectures; all of them if none is named"
    )
    parser.add_argument("--base", type=Path, metavar="CHECKOUT", help="an older checkout")
    parser.add_argument(
        "--tiny", action="store_true", help="a small shape, only to show that everything works"
    )
    parser.add_argument("--output", type=Path, default=HERE)
    arguments = parser.parse_args()
    report = Report(torch.device("cpu"), "float32")
    llama = Architecture("llama").build()
    old = {} if arguments.base is None else old_strategies(arguments.base)
    for architecture in ARCHITECTURES:
        if not arguments.names or architecture.kind in arguments.names:
            measure(architecture, old, llama, _shape(architecture, is_tiny=arguments.tiny), report)
    report.write(arguments.output / "families.csv")


def _shape(architecture: Architecture, *, is_tiny: bool) -> Shape:
    if is_tiny:
        return Shape(40, 2, 8)
    # Recurrent layers are slow on a CPU: a shorter prompt.
    return Shape(4000, 8, 64) if architecture.before == "packed" else Shape(1000, 8, 64)


if __name__ == "__main__":
    main()
