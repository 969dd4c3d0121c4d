#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0, gguf 0.19.0): the tokenizer of a GGUF file splits prices in another way than the
# policy's own, where transformers does not know the name of its pre-tokenizer.
#
# Behaviour: a GGUF file only names the expressions that split text before merges (tokenizer.ggml.pre). For most
# names (smollm, starcoder, deepseek-v3, falcon, command-r …) transformers splits like GPT-2, without a warning; it
# knows llama-bpe, qwen2 and a few others.
#
# Seen: "for $1234.50" with pre "smollm", whose own tokenizer splits all digits (1, 2, 3, 4 …):
#       for | $| 1234 ... the same parts as with pre "gpt-2", and as with the made-up name "no-such-name".
#
# Why it matters: prices, ratings and ids of products are all over shopping pages. The policy gets token ids that it
# has never seen in its training for them, and token-level log-probabilities do not align with the rollouts of
# llama.cpp or vLLM. Take tokenizer.json of the original model instead of the GGUF file's tokenizer.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0
cd "$dir"
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1
venv/bin/python - <<'EOF'
import gguf
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

TEXT = "for $1234.50"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def parts(name):
    """Of the text, by the tokenizer of a GGUF file with this pre-tokenizer."""
    writer = gguf.GGUFWriter("policy.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([*ALPHABET, "er"])
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(ALPHABET) + 1))
    writer.add_token_merges(["e r"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="policy.gguf")
    spans = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    print(f"{name:14}", "|".join(TEXT[start:end] for _, (start, end) in spans))
    return [TEXT[start:end] for _, (start, end) in spans]


gpt2, smollm, unknown, qwen = (parts(name) for name in ("gpt-2", "smollm", "no-such-name", "qwen2"))
if not (gpt2 == smollm == unknown and "1234" in smollm and "1234" not in qwen):
    raise SystemExit("the behaviour has changed: expected GPT-2's parts for all names but qwen2")
EOF
