#!/usr/bin/env bash
# tokenizers 0.23.3: Tokenizer.decode stops all other Python threads while it runs; decode_batch does not.
#
# Behaviour: decode keeps the interpreter lock (GIL) from its first to its last token. decode_batch, with a list of
# one sequence and the same result, releases it. The same holds of encode and encode_batch.
#
# Seen, 600,000 tokens, longest pause of another thread as a share of the call:
#     decode       1.00 of the call
#     decode_batch 0.1 of the call or less
#
# Why it matters: a reward service or an asynchronous rollout worker decodes completions beside an event loop.
# Moving decode into a thread does not help: health checks and the requests of other trainers still wait for the
# longest rollout. tokenizer.decode of transformers calls this method. Use decode_batch([ids])[0].
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check tokenizers==0.23.3
cd "$dir"
venv/bin/python - <<'EOF'
import threading
import time

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
tokenizer.decoder = decoders.ByteLevel()
ids = [tokenizer.token_to_id(char) for char in "shoppingcart"] * 50_000


def share_of_longest_pause(call):
    """Longest pause of a second thread during the call, as a share of it."""
    started, done, pauses = threading.Event(), threading.Event(), []

    def watch():
        last = time.perf_counter()
        started.set()
        while not done.is_set():
            now = time.perf_counter()
            pauses.append(now - last)
            last = now
            time.sleep(0)

    thread = threading.Thread(target=watch)
    thread.start()
    started.wait()
    begin = time.perf_counter()
    call()
    took = time.perf_counter() - begin
    done.set()
    thread.join()
    return max(pauses) / took


if tokenizer.decode(ids) != tokenizer.decode_batch([ids])[0]:
    raise SystemExit("the behaviour has changed: the texts differ")
# A busy machine interrupts both threads: the clearest of five tries counts.
alone = max(share_of_longest_pause(lambda: tokenizer.decode(ids)) for _ in range(5))
batch = min(share_of_longest_pause(lambda: tokenizer.decode_batch([ids])) for _ in range(5))
print(f"decode {alone:.2f}, decode_batch {batch:.2f} of the call")
if not (alone > 0.8 and batch < 0.5):
    raise SystemExit("the behaviour has changed: expected more than 0.8 and less than 0.5")
EOF
