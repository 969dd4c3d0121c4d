#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0): a checkpoint whose experts have a gap loads with its experts in other places.
#
# Behaviour: transformers 5 stacks the experts of a mixture into one tensor when it loads a checkpoint. The numbers
# in the names of the experts order them, but are not their places: a file with the experts 0, 2, 3 and 9 becomes
# the experts 0, 1, 2 and 3. There is no error, and missing_keys, unexpected_keys and mismatched_keys are empty.
#
# Seen: expert 1 was stored as expert 9; after from_pretrained the places 0 to 3 hold the experts 0, 2, 3 and 1.
#
# Why it matters: checkpoints of expert-parallel trainers are merged from files per rank, with numbers that a
# script computes. A wrong offset gives a policy whose router sends tokens to the wrong experts. Its rollouts and
# log-probabilities are wrong, and the loading report is clean. Compare the numbers in the names with num_experts.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$dir"
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1
venv/bin/python - <<'EOF'
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

config = Qwen3MoeConfig(
    **{"vocab_size": 64, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
)
torch.manual_seed(0)
original = Qwen3MoeForCausalLM(config)
original.save_pretrained("policy")
tensors = load_file("policy/model.safetensors")
renamed = {name.replace(".experts.1.", ".experts.9."): tensor for name, tensor in tensors.items()}
print(sorted(name for name in renamed if "experts" in name and "down" in name))
save_file(renamed, "policy/model.safetensors", {"format": "pt"})
model, report = AutoModelForCausalLM.from_pretrained("policy", output_loading_info=True)
print(report)
own, loaded = (each.model.layers[0].mlp.experts.down_proj for each in (original, model))
places = [next((i for i in range(4) if torch.equal(own[i], expert)), None) for expert in loaded]
print("the places 0 to 3 hold the experts", places)
if places != [0, 2, 3, 1] or any(report.values()):
    raise SystemExit("the behaviour has changed: expected [0, 2, 3, 1] and an empty report")
EOF
