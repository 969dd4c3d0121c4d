#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0, safetensors 0.8.0): a loaded model follows later writes to its checkpoint file.
#
# Behaviour: from_pretrained on a CPU, in the dtype of the file, maps model.safetensors into memory and does not
# copy it. If the bytes of the file are replaced in place, the weights of the model that was loaded long ago change.
# With another dtype= than the file's the weights are a copy, and stay.
#
# Seen: the logits of the loaded model become those of the model that was written over its file.
#       With dtype=torch.float64 they stay.
#
# Why it matters: trainers overwrite a `latest/` directory, and rsync --inplace or a shared volume does so in place.
# A reference model or reward model that was loaded from there on a CPU then computes KL or rewards with other
# weights than it was loaded with, and reports nothing. Load such models from a directory that is never written
# again, or replace files by renaming.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
cd "$dir"
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1
venv/bin/python - <<'EOF'
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
ids = torch.arange(10)[None]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids).logits.double()


for step in (1, 2):
    torch.manual_seed(step)
    LlamaForCausalLM(config).save_pretrained(f"step-{step}")
file = Path("step-1/model.safetensors")
mapped = AutoModelForCausalLM.from_pretrained("step-1")
copied = AutoModelForCausalLM.from_pretrained("step-1", dtype=torch.float64)
first, first_copied = logits(mapped), logits(copied)
second = logits(AutoModelForCausalLM.from_pretrained("step-2"))
with file.open("r+b") as stream:  # in place, same size
    stream.write(Path("step-2/model.safetensors").read_bytes())
print("logits changed by", (logits(mapped) - first).abs().max().item())
print("distance to the new file's:", (logits(mapped) - second).abs().max().item())
print("of the copy:", (logits(copied) - first_copied).abs().max().item())
if torch.equal(logits(mapped), first) or not torch.equal(logits(mapped), second):
    raise SystemExit("the behaviour has changed: the loaded model no longer follows its file")
if not torch.equal(logits(copied), first_copied):
    raise SystemExit("the behaviour has changed: the copy follows the file, too")
EOF
