#!/usr/bin/env bash
# peft 0.21.2 (transformers 5.23.0, torch 2.13.0): LoRA for the dense layers or shared experts of a mixture is impossible.
#
# Behaviour: transformers 5 stacks the routed experts of a mixture into parameters. PEFT replaces every target module
# whose name ends in gate_proj, up_proj or down_proj by these stacks, and drops the name. But dense layers and shared
# experts still have Linear modules of these names: they get no adapter, however they are named. No warning of it.
#
# Seen, GLM-4 MoE with a dense layer 0, and routed and shared experts in layer 1 (also DeepSeek V3, Qwen2 MoE …):
#     target_modules                                adapted
#     ["gate_proj", "up_proj", "down_proj"]         layers.1.mlp.experts
#     "all-linear"                                  the same, attention and router
#     ["shared_experts.gate_proj", …]               layers.1.mlp.experts
#
# Why it matters: the first two are the usual configs for LoRA in RL. Shared experts and dense layers see every token;
# without them it is a weaker policy than the config says, or said before. The last one names the shared experts,
# leaves them out, and trains all routed experts, the largest part of the model, instead. Print the adapted modules.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$dir"
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1
venv/bin/python -W ignore - <<'EOF'
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

CONFIG = AutoConfig.for_model(
    "glm4_moe",
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
)
PARTS = ("gate_proj", "up_proj", "down_proj")
SHARED = [f"shared_experts.{part}" for part in PARTS]


def adapted_mlps(target_modules):
    """MLPs with an adapter; `base_layer` is the second one of the stacked experts."""
    model = get_peft_model(AutoModelForCausalLM.from_config(CONFIG), LoraConfig(r=4, target_modules=target_modules))
    modules = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    paths = {name.removeprefix("base_model.model.model.").removesuffix(".base_layer") for name in modules}
    found = sorted(path for path in paths if ".mlp." in path and not path.endswith(".gate"))
    print(target_modules, "->", found)
    return found


linear = {name for name, _ in AutoModelForCausalLM.from_config(CONFIG).named_modules() if name.endswith(PARTS)}
if len(linear) != 6:
    raise SystemExit("the behaviour has changed: expected Linear modules in a dense layer and a shared expert")
for targets in (list(PARTS), "all-linear", SHARED):
    if adapted_mlps(targets) != ["layers.1.mlp.experts"]:
        raise SystemExit("the behaviour has changed: expected an adapter of the routed experts only")
EOF
