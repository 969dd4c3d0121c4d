#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0, gguf 0.19.0): the RoPE scaling of a GGUF file is not read.
#
# Behaviour: from_pretrained(gguf_file=…) maps rope.freq_base to the config, and leaves out rope.scaling.type and
# rope.scaling.factor. The model is built without the scaling that its weights were trained with. No warning.
#
# Seen: Gemma 3's linear factor 8 of the layers with full attention, and YaRN's factor 4 of Qwen 3, are in the file,
#       and the config says rope_type "default" for all layers.
#
# Why it matters: a GGUF file is a handy reference policy on a machine without a GPU. llama.cpp, which made the
# rollouts, reads the factor. The log-probabilities of transformers are those of another model: Gemma 3 from 4B on is
# wrong at every length, as its full attention sees all distances eight times as large.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0
cd "$dir"
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1
venv/bin/python - <<'EOF'
import gguf
from transformers import AutoConfig


def rope_types(architecture, kind, factor):
    """By the config of a GGUF file with metadata and no tensors."""
    writer = gguf.GGUFWriter("policy.gguf", architecture)
    writer.add_vocab_size(64)
    writer.add_context_length(131072)
    writer.add_embedding_length(64)
    writer.add_block_count(6)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_scaling_type(kind)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(32768)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = AutoConfig.from_pretrained(".", gguf_file="policy.gguf")
    print(architecture, kind.value, factor, "->", config.rope_parameters)
    rope = config.rope_parameters
    return [part["rope_type"] for part in rope.values() if isinstance(part, dict)] or [rope["rope_type"]]


gemma = rope_types("gemma3", gguf.RopeScalingType.LINEAR, 8.0)
qwen = rope_types("qwen3", gguf.RopeScalingType.YARN, 4.0)
if {*gemma, *qwen} != {"default"}:
    raise SystemExit("the behaviour has changed: expected the type 'default' everywhere")
EOF
