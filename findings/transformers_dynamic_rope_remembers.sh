#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0): with dynamic RoPE, log-probabilities depend on earlier, unrelated sequences.
#
# Behaviour: with rope_type "dynamic" (NTK scaling by length) the model keeps the frequencies of the longest
# sequence that it has seen. A later sequence that is longer than max_position_embeddings, but shorter than that
# one, is computed with the frequencies of the longer one. Only a sequence within max_position_embeddings resets
# them. The weights and the call are the same.
#
# Seen, max_position_embeddings 32: the log-probabilities of a sequence of 40 tokens change after one of 80
# tokens, and are the old ones again after one of 20 tokens.
#
# Why it matters: shopping pages are long, and rollouts of a batch have different lengths. The log-probabilities
# of the same rollout differ between the sampling, the old and the new policy only because other rollouts came
# before: the importance ratio is not 1 at the first step, and two data-parallel ranks disagree. Scores of a
# reward model change with the order of requests.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$dir"
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1
venv/bin/python - <<'EOF'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 32, "initializer_range": 0.3},
    rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
)
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(64, (1, 80))


@torch.no_grad()
def log_probs(num_tokens):
    return model(input_ids=ids[:, :num_tokens], use_cache=False).logits.log_softmax(-1)


fresh = log_probs(40)
again = (log_probs(40) - fresh).abs().max().item()
log_probs(80)
after_a_longer = (log_probs(40) - fresh).abs().max().item()
log_probs(20)
after_a_short = (log_probs(40) - fresh).abs().max().item()
print(f"change in nats: again {again}, after a longer {after_a_longer}, after a short {after_a_short}")
if again != 0 or after_a_longer < 0.01 or after_a_short != 0:
    raise SystemExit("the behaviour has changed: expected no change, a change, and no change")
EOF
