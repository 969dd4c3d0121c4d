#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0): logits_scaling divides in Granite and multiplies in HyperCLOVA X.
#
# Behaviour: both configs have a field `logits_scaling`. Granite's forward divides the logits by it, HyperCLOVA X's
# multiplies them.
#
# Seen, logits_scaling 4: the logits of Granite are a quarter of those of its LM head, those of HyperCLOVA X are
# four times as large.
#
# Why it matters: RL code computes log-probabilities from hidden states and the LM head itself, in chunks or fused
# with the loss, to save the memory of full logits. Code that was written for Granite's field is wrong by its square
# for HyperCLOVA X: the same tokens are most likely, but every log-probability, KL and entropy is wrong.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$dir"
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1
venv/bin/python - <<'EOF'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@torch.no_grad()
def factor(kind):
    """Of the logits, against the LM head's."""
    config = AutoConfig.for_model(kind, **SIZES, num_attention_heads=4, num_key_value_heads=2, logits_scaling=4.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(10)[None]
    logits = model(input_ids=ids).logits
    return (logits / model.lm_head(model.model(input_ids=ids).last_hidden_state)).median().item()


factors = {kind: factor(kind) for kind in ("granite", "hyperclovax")}
print(factors)
if abs(factors["granite"] - 0.25) > 1e-3 or abs(factors["hyperclovax"] - 4) > 1e-3:
    raise SystemExit("the behaviour has changed: expected 0.25 and 4")
EOF
