#!/usr/bin/env bash
# peft 0.21.2 (transformers 5.23.0, torch 2.13.0): merge_and_unload adds the adapters of all layers to a shared weight.
#
# Behaviour: where several layers share a base weight, merge_and_unload adds the adapter of each to the one tensor.
# (1) ensure_weight_tying=True with a tied embedding and LM head: the one adapter of both is added twice, W + 2 BA.
# (2) layer_replication: the adapters of all copies of a layer are added to the one layer.
# In the first case PEFT warns that tied targets "can lead to complications", in the second it says nothing.
#
# Seen: merging changes logits by 7.4 where the largest is 6.8 (tied), and by 2.4 where it is 4.7 (replicated). For
#       an adapter of q_proj alone it changes them by 4e-6.
#
# Why it matters: RL trainers with LoRA merge the adapter to hand the policy to vLLM or to a reward service. The
# rollouts then come from another policy than the one that is trained. Untie the weights and copy the replicated
# layers before merging.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$dir"
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1
venv/bin/python - <<'EOF'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.arange(12)[None]


@torch.no_grad()
def change_by_merging(tied=False, **options):
    """Largest change of a logit, and the largest logit."""
    config = LlamaConfig(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "initializer_range": 0.3, "tie_word_embeddings": tied},
    )
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, lora_alpha=4, **options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.3)
    before = model(input_ids=ids).logits
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = model.merge_and_unload()
    print("warnings of merging:", [str(each.message)[:60] for each in caught])
    return (merged(input_ids=ids).logits - before).abs().max().item(), before.abs().max().item()


changes = {
    "q_proj": change_by_merging(target_modules=["q_proj"]),
    "tied": change_by_merging(tied=True, target_modules=["embed_tokens"], ensure_weight_tying=True),
    "replicated": change_by_merging(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]),
}
for name, (change, largest) in changes.items():
    print(f"{name}: changed by {change:.2g}, largest logit {largest:.2g}")
if changes["q_proj"][0] > 1e-3 or changes["tied"][0] < 0.1 or changes["replicated"][0] < 0.1:
    raise SystemExit("the behaviour has changed: expected no change, and two large ones")
EOF
