#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0): an RWKV model divides its own weights when it is evaluated.
#
# Behaviour: the first forward of an RWKV model in eval mode divides weights of later layers by powers of two, in
# place (config.rescale_every, 6 by default), and the first forward in train mode multiplies them again. The model
# remembers this in a flag. state_dict() and save_pretrained() give the divided weights, and load_state_dict() does
# not reset the flag.
#
# Seen, 8 layers: a checkpoint that is saved after one evaluation gives other logits when it is loaded.
#       After load_state_dict() with its own, undivided weights, the model gives other logits than before.
#
# Why it matters: RL trainers sample in eval mode and then send or save the policy's weights. The receiver gets
# weights that were divided once and divides them again; and a policy that is updated in place after its first
# rollout computes with weights that are too large. Set config.rescale_every = 0 in both.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$dir"
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1
venv/bin/python - <<'EOF'
import copy

import torch
from transformers import AutoModelForCausalLM, RwkvConfig, RwkvForCausalLM

config = RwkvConfig(
    vocab_size=64, context_length=64, hidden_size=32, attention_hidden_size=32, num_hidden_layers=8
)
torch.manual_seed(0)
model = RwkvForCausalLM(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
ids = torch.arange(12)[None]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids).logits


before_evaluation = copy.deepcopy(model.state_dict())
reference = logits(model)
model.save_pretrained("saved")
reloaded = (logits(AutoModelForCausalLM.from_pretrained("saved")) - reference).abs().max().item()
model.load_state_dict(before_evaluation)
updated = (logits(model) - reference).abs().max().item()
print(f"largest logit {reference.abs().max().item():.3f}; changes: saved {reloaded:.3f}, updated {updated:.3f}")
if reloaded < 0.01 or updated < 0.01:
    raise SystemExit("the behaviour has changed: expected other logits in both cases")
EOF
