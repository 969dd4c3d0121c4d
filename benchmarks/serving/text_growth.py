"""Work on texts at n, 2n, 4n and 8n: `python -m benchmarks.serving.text_growth`; writes text_growth.csv.

A row is a path and a text that is hard for it. `x2`, `x4` and `x8` are the times at 2n, 4n and 8n, and
`lines_x8` the lines of Python that run at 8n, as multiples of those at n: where the work is linear they are
at most 2, 4 and 8. `pause_ms` is the longest time for which another thread does not run, at 8n.
"""

import argparse
import contextlib
import csv
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from shopr1_client.wire import Message, ScoreRequest
from shopr1_rewards.completion import parse_strict, parse_tolerant
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_rewards.similarity import rouge_l_f1
from shopr1_service.core import CompletionTokens, PromptKey, TokenGroup
from shopr1_service.monitoring.training_metrics import repetition_ratio
from shopr1_service.policy.prompts.chat import lost_messages
from shopr1_service.policy.prompts.tokenizer import PolicyTokenizer
from shopr1_service.scheduling.request_queue import QueuedGroup, RequestQueue
from shopr1_service.scoring.label_store import prompt_digest
from tests.support.models import NUM_ROWS, byte_fallback, byte_level

Work = Callable[[], object]
FACTORS = (1, 2, 4, 8)
_TRUTH = "a b " * 2048
_MESSAGE = Message(role="user", content="x")
_TICK_S = 0.0005


@dataclass(frozen=True)
class Growth:
    """A row of the table."""

    path: str
    n: int
    milliseconds: float
    x2: float
    x4: float
    x8: float
    lines_x8: float
    pause_ms: float


def paths() -> Iterator[tuple[str, Callable[[int], Work]]]:
    """Names of paths, and for a length the work to be done."""
    for name, tokenizer in (("byte level", byte_level()), ("fallback", byte_fallback())):
        yield from _tokenizer_paths(name, PolicyTokenizer(tokenizer, NUM_ROWS, []))
    yield "ROUGE-L, 4,096 words against many", lambda m: lambda: rouge_l_f1("b a " * m, _TRUTH)
    yield "ROUGE-L, one word", lambda m: lambda: rouge_l_f1("é" * m, "é")
    yield "ROUGE-L, marks", lambda m: lambda: rouge_l_f1("e" + "\u0301\u0316" * m, "e")
    yield "strict reading, a long number", lambda m: lambda: parse_strict('{"a":' + "1" * m + "}")
    yield "tolerant reading, no syntax", lambda m: lambda: parse_tolerant('{"rationale":x,"action":1}' * m)
    yield "tolerant reading, braces in strings", lambda m: lambda: parse_tolerant('{"{":"{",' * m)
    yield "a body of completions", lambda m: lambda: _validated(["x"] * m)
    yield "a body of token ids", lambda m: lambda: _validated([{"token_ids": [1] * m}])
    yield "a body of wrong values", lambda m: lambda: _validated([1] * m)
    yield "digest of a prompt", lambda m: lambda: prompt_digest("x" * m)
    yield "repetition of a rationale", lambda m: lambda: repetition_ratio([1, 2] * m)
    yield "a chat's lost messages", lambda m: lambda: lost_messages("x " * m, [_MESSAGE] * m)
    yield "groups of one prompt in the queue", _queue_work


def _tokenizer_paths(name: str, codec: PolicyTokenizer) -> Iterator[tuple[str, Callable[[int], Work]]]:
    vocabulary = codec.tokenizer.get_vocab()
    first_byte = vocabulary.get("<0xE8>", vocabulary.get("è", 0))  # of a character of three
    yield f"decoding parts of characters, {name}", lambda m: lambda: codec.decode([first_byte] * m)
    yield f"encoding one word, {name}", lambda m: lambda: codec.encode_text("x" + "a" * m)
    yield f"encoding blanks, {name}", lambda m: lambda: codec.encode_text("x" + " " * m)


def _queue_work(num_groups: int) -> Work:
    prompt = TokenGroup(PromptKey((1,)), [CompletionTokens((1,), (0,))])
    groups = [QueuedGroup(prompt, SelfCertaintyRecipe(alpha=1.0), 0.0, -float(i)) for i in range(num_groups)]

    def work() -> None:
        queue = RequestQueue()
        queue.add(groups)
        queue.discard(groups)

    return work


def _validated(completions: Sequence[object]) -> None:
    body = {"groups": [{"prompt": "", "ground_truth": {}, "completions": completions}]}
    read = json.loads(json.dumps(body))
    with contextlib.suppress(ValueError):
        ScoreRequest.model_validate(read)


def measure(name: str, make: Callable[[int], Work], n: int) -> Growth:
    """The growth of one path."""
    make(n)()  # caches
    seconds = [min(_seconds(make(n * factor)) for _ in range(3)) for factor in FACTORS]
    lines = [_lines(make(n * factor)) for factor in (FACTORS[0], FACTORS[-1])]
    x2, x4, x8 = (round(each / seconds[0], 1) for each in seconds[1:])
    pause_ms = round(_pause_s(make(n * FACTORS[-1])) * 1e3, 1)
    return Growth(name, n, round(seconds[0] * 1e3, 2), x2, x4, x8, round(lines[1] / lines[0], 1), pause_ms)


def _seconds(work: Work) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def _lines(work: Work) -> int:
    counted = 0

    def count(frame: object, event: str, argument: object) -> object:
        nonlocal counted
        counted += event == "line"
        return count

    sys.settrace(count)  # type: ignore[arg-type]
    try:
        work()
    finally:
        sys.settrace(None)
    return max(counted, 1)


def _pause_s(work: Work) -> float:
    """The longest time for which another thread did not run."""
    done, longest_s = threading.Event(), 0.0

    def tick() -> None:
        nonlocal longest_s
        last_s = time.perf_counter()
        while not done.wait(_TICK_S):
            now_s = time.perf_counter()
            longest_s, last_s = max(longest_s, now_s - last_s), now_s

    ticker = threading.Thread(target=tick)
    ticker.start()
    work()
    done.set()
    ticker.join()
    return longest_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=4000)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("text_growth.csv"))
    options = parser.parse_args()
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Growth))
        for name, make in paths():
            row = measure(name, make, options.n)
            writer.writerow(astuple(row))
            print(*astuple(row), sep="\t", flush=True)


if __name__ == "__main__":
    main()
