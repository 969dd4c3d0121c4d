"""Trace for the simulation: from rollout logs, or of synthetic sessions that a real service scores.

    python -m benchmarks.capacity.record_trace [LOG ...]

Logs are those of a service with `rollout_log_text = true`. Without logs, the sessions are synthetic, in the
form of `examples/sessions.jsonl`: each step's prompt has all pages so far. Their tokens are real, and so are
the times at which the service scored each group.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from benchmarks.capacity.trace import TRACE, Request, logged_groups, trace_of, write_trace
from benchmarks.serving.local_server import Body, score, served
from benchmarks.subject import embedded_policy
from shopr1_service.settings import load_settings

EXAMPLES = Path(__file__).parents[2] / "examples" / "sessions.jsonl"
NUM_SESSIONS, NUM_CONCURRENT = 16, 4
NUM_STEPS = (3, 9)
NUM_COMPLETIONS = 4
LIST_LENGTHS, PAGE_SENTENCES = (4, 9), (6, 18)
THINGS = (
    "mug",
    "bowl",
    "teapot",
    "apron",
    "dutch oven",
    "cutting board",
    "salt mill",
    "tray",
    "jug",
    "plate",
)
KINDS = ("blue stoneware", "white porcelain", "cast iron", "linen", "oak", "brushed steel", "recycled glass")
SENTENCES = (
    "Dishwasher safe, and fit for the microwave.",
    "Each piece is glazed by hand, so that no two are quite the same.",
    "Ships within two working days from our own store.",
    "Customers who bought this also looked at the matching tray.",
    "Please keep away from an open flame; do not leave it to soak over night.",
    "I like how heavy it feels, but the handle is smaller than I thought.",
    "Bought as a present for my sister, and she uses it every day.",
)
REASONS = (
    "We need something that lasts, and the reviews speak well of this one.",
    "It costs less than the others and comes by Friday.",
    "I would like to see it from close by before I decide.",
    "This is more than I wanted to spend, so I look further.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Record a trace for the simulation.")
    parser.add_argument("logs", nargs="*", type=Path, metavar="LOG", help="rollout logs with text")
    parser.add_argument("--output", type=Path, default=TRACE)
    options = parser.parse_args()
    write_trace(recorded_trace(options.logs), options.output)


def recorded_trace(logs: Sequence[Path]) -> list[Request]:
    """Trace of these logs, or of synthetic sessions."""
    with tempfile.TemporaryDirectory() as directory:
        log = {"rollout_log": directory, "rollout_log_text": True}
        settings = load_settings({"dtype": "bfloat16", "log_level": "error", **log})
        policy = embedded_policy(settings)
        if not logs:
            with served(settings, policy) as client, ThreadPoolExecutor(NUM_CONCURRENT) as pool:
                list(pool.map(lambda seed: _run_session(client, seed), range(NUM_SESSIONS)))
            logs = sorted(Path(directory).glob("*.jsonl"))
        return trace_of(logged_groups(logs, policy.codec))


def _run_session(client: httpx.Client, seed: int) -> None:
    for body in steps(random.Random(seed)):
        score(client, body)


def steps(rng: random.Random) -> Iterator[Body]:
    """Requests of a session: one group per step."""
    system, user = json.loads(EXAMPLES.read_text("utf-8").splitlines()[0])["prompt"]
    pages, _, cue = user["content"].rpartition("\n")
    for number in range(2, 2 + rng.randint(*NUM_STEPS)):
        prompt = [system, {"role": "user", "content": f"{pages}\n{cue}"}]
        completions = [_completion(rng) for _ in range(NUM_COMPLETIONS)]
        yield {
            "groups": [{"prompt": prompt, "ground_truth": {"type": "terminate"}, "completions": completions}]
        }
        pages += f"\nPage {number}: {_list_page(rng) if number % 2 == 0 else _product_page(rng)}"


def _list_page(rng: random.Random) -> str:
    articles = "".join(_article(rng) for _ in range(rng.randint(*LIST_LENGTHS)))
    return (
        f'<html><body><main><a name="refinements.price_under_25">Under 25</a>{articles}</main></body></html>'
    )


def _article(rng: random.Random) -> str:
    product, name = _product(rng)
    price, stars, reviews = (
        rng.randint(900, 9900) / 100,
        rng.randint(30, 50) / 10,
        rng.randint(3, 900),
    )
    return (
        f'<article name="results.{name}"><h2>{product}</h2><p>{price} · {stars} stars ({reviews})</p>'
        f'<a name="results.{name}.view_product">View</a></article>'
    )


def _product_page(rng: random.Random) -> str:
    product, name = _product(rng)
    text = " ".join(rng.choices(SENTENCES, k=rng.randint(*PAGE_SENTENCES)))
    return (
        f'<html><body><main><h1>{product}</h1><p>{text}</p><a name="{name}.buy">Buy</a></main></body></html>'
    )


def _product(rng: random.Random) -> tuple[str, str]:
    product = f"{rng.choice(KINDS)} {rng.choice(THINGS)} no. {rng.randint(1, 99)}"
    return product, product.replace(". ", "_").replace(" ", "_")


def _completion(rng: random.Random) -> str:
    rationale = " ".join(rng.sample(REASONS, k=rng.randint(1, 3)))
    action: dict[str, Any] = {"type": "click", "name": f"results.{_product(rng)[1]}.view_product"}
    return json.dumps({"rationale": rationale, "action": action})


if __name__ == "__main__":
    main()
