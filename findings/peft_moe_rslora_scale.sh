#!/usr/bin/env bash
# peft 0.21.2 (transformers 5.23.0, torch 2.13.0): an rsLoRA adapter of a mixture is applied 1.41 times too strongly.
#
# Behaviour: transformers 5 stacks the experts of a mixture and joins the projections w1 and w3 (gate and up). PEFT
# converts adapters of the single experts when it loads them, and doubles rank and alpha of the joined ones, so that
# alpha / r stays. With use_rslora the factor is alpha / sqrt(r), and becomes 2 alpha / sqrt(2 r): 1.41 times as
# large. The down projection w2 keeps its factor. PEFT warns that it ignores the doubled values, but uses them.
#
# Seen, Mixtral, r 4 and alpha 8, the change of the weights by merging, against factor * B A:
#       without use_rslora: w1 1.000, w3 1.000, w2 1.000
#       with use_rslora:    w1 1.414, w3 1.414, w2 1.000
#
# Why it matters: an adapter of a policy or reward model that was trained with transformers 4 gives other rollouts and
# rewards after an upgrade, without an error or a changed file. A run that is resumed starts from another policy. A new
# adapter learns w1 and w3 with another effective step than w2.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$dir"
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1
venv/bin/python - <<'EOF'
import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

HIDDEN, INNER, RANK, ALPHA = 32, 48, 4, 8
SHAPES = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}
NAME = "base_model.model.model.layers.0.block_sparse_moe.experts.{}.{}.lora_{}.weight"


def model():
    sizes = {"vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2))


def ratios(use_rslora):
    """Changes of expert 1 by merging an adapter, against factor * B A."""
    pairs = {name: (torch.randn(rows, RANK), torch.randn(RANK, columns)) for name, (rows, columns) in SHAPES.items()}
    tensors = {}
    for name, (b, a) in pairs.items():
        for expert in (0, 1):
            tensors[NAME.format(expert, name, "A")] = a.clone()
            tensors[NAME.format(expert, name, "B")] = b.clone()
    save_file(tensors, "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": [*SHAPES], "use_rslora": use_rslora}
    Path("adapter_config.json").write_text(json.dumps(config))
    before = model().model.layers[0].mlp.experts
    after = PeftModel.from_pretrained(model(), ".").merge_and_unload().model.layers[0].mlp.experts
    gate, up = (after.gate_up_proj - before.gate_up_proj)[1].chunk(2)
    changes = {"w1": gate, "w3": up, "w2": (after.down_proj - before.down_proj)[1]}
    factor = ALPHA / RANK**0.5 if use_rslora else ALPHA / RANK
    return {name: round((changes[name] / (factor * b @ a)).median().item(), 3) for name, (b, a) in pairs.items()}


plain, rslora = ratios(use_rslora=False), ratios(use_rslora=True)
print("without use_rslora:", plain)
print("with use_rslora:   ", rslora)
if plain != {"w1": 1, "w3": 1, "w2": 1} or rslora != {"w1": 1.414, "w3": 1.414, "w2": 1}:
    raise SystemExit("the behaviour has changed: expected 1 everywhere, but 1.414 for w1 and w3 with rsLoRA")
EOF
