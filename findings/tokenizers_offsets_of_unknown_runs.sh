#!/usr/bin/env bash
# tokenizers 0.23.3: offsets of a Unigram model with byte fallback do not tell characters of an unknown run apart.
#
# Behaviour: characters that are no tokens become byte tokens. With Unigram (SentencePiece's default, T5, XLM-R), all
# bytes of consecutive unknown characters get the offsets of the whole run. With BPE each byte gets those of its own
# character. The ids are the same.
#
# Seen, "a茶|便" of which only "a" is a token, one for a, and 3, 1 and 3 for the others:
#     BPE     (0, 1), 3 x (1, 2), (2, 3), 3 x (3, 4)
#     Unigram (0, 1), 7 x (1, 4)
#
# Why it matters: reward and loss masks choose tokens by the characters that they cover, such as the tokens of the
# rationale and not those of the action after it. Product names are full of emoji and CJK characters. With Unigram
# a border within such a run selects tokens of both sides, so the reward of one field reaches the tokens of another.
# Decode the ids step by step to find the characters of each token.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check tokenizers==0.23.3
cd "$dir"
venv/bin/python - <<'EOF'
from tokenizers import Tokenizer, models

TEXT = "a茶|便"
tokens = ["<unk>", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
bpe = models.BPE({token: number for number, token in enumerate(tokens)}, [], byte_fallback=True, unk_token="<unk>")
unigram = models.Unigram([(token, -1.0) for token in tokens], unk_id=0, byte_fallback=True)
of_bpe, of_unigram = (Tokenizer(model).encode(TEXT) for model in (bpe, unigram))
print("BPE    ", of_bpe.offsets)
print("Unigram", of_unigram.offsets)
expected = [(0, 1), *[(1, 2)] * 3, (2, 3), *[(3, 4)] * 3]
if of_bpe.ids != of_unigram.ids or of_bpe.offsets != expected:
    raise SystemExit(f"the behaviour has changed: expected equal ids, and {expected} of BPE")
if of_unigram.offsets != [(0, 1), *[(1, 4)] * 7]:
    raise SystemExit("the behaviour has changed: expected (1, 4) seven times of Unigram")
EOF
