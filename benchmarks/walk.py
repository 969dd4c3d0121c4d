"""Shopping sessions that are scored by a real service, to record a trace of them.

The shop is made up, in the shape of `examples/sessions.jsonl`: each step's prompt has all pages so far. What
is recorded is real: the tokens, and when the service had scored each group.
"""

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from serving import Body, score, served
from shopr1_service.policy import factory as building
from shopr1_service.policy import loading as source
from shopr1_service.settings import load_settings
from subject import load_model
from traces import Request, scored_groups, trace_of

EXAMPLES = Path(__file__).parents[1] / "examples" / "sessions.jsonl"
NUM_SESSIONS, NUM_AT_ONCE = 16, 4
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


def recorded_walk(logs: Sequence[Path]) -> list[Request]:
    """A trace of the walk, or of these logs instead."""
    with tempfile.TemporaryDirectory() as directory:
        log = {"rollout_log": directory, "rollout_log_text": True}
        settings = load_settings({"dtype": "bfloat16", "log_level": "error", **log})
        tokenizer, model = load_model(settings)
        policy = building.build_policy(model, tokenizer, settings, name=source.EMBEDDED_NAME)
        if not logs:
            with served(settings, policy) as client, ThreadPoolExecutor(NUM_AT_ONCE) as pool:
                list(pool.map(lambda seed: _walk(client, seed), range(NUM_SESSIONS)))
            logs = sorted(Path(directory).glob("*.jsonl"))
        return trace_of(scored_groups(logs, policy.codec))


def _walk(client: httpx.Client, seed: int) -> None:
    for body in steps(random.Random(seed)):
        score(client, body)


def steps(chance: random.Random) -> Iterator[Body]:
    """The requests of a session: a group for each step."""
    system, user = json.loads(EXAMPLES.read_text("utf-8").splitlines()[0])["prompt"]
    pages, _, cue = user["content"].rpartition("\n")
    for number in range(2, 2 + chance.randint(*NUM_STEPS)):
        prompt = [system, {"role": "user", "content": f"{pages}\n{cue}"}]
        completions = [_answer(chance) for _ in range(NUM_COMPLETIONS)]
        yield {
            "groups": [{"prompt": prompt, "ground_truth": {"type": "terminate"}, "completions": completions}]
        }
        pages += f"\nPage {number}: {_list_page(chance) if number % 2 == 0 else _product_page(chance)}"


def _list_page(chance: random.Random) -> str:
    articles = "".join(_article(chance) for _ in range(chance.randint(*LIST_LENGTHS)))
    return (
        f'<html><body><main><a name="refinements.price_under_25">Under 25</a>{articles}</main></body></html>'
    )


def _article(chance: random.Random) -> str:
    product, name = _product(chance)
    price, stars, reviews = (
        chance.randint(900, 9900) / 100,
        chance.randint(30, 50) / 10,
        chance.randint(3, 900),
    )
    return (
        f'<article name="results.{name}"><h2>{product}</h2><p>{price} · {stars} stars ({reviews})</p>'
        f'<a name="results.{name}.view_product">View</a></article>'
    )


def _product_page(chance: random.Random) -> str:
    product, name = _product(chance)
    text = " ".join(chance.choices(SENTENCES, k=chance.randint(*PAGE_SENTENCES)))
    return (
        f'<html><body><main><h1>{product}</h1><p>{text}</p><a name="{name}.buy">Buy</a></main></body></html>'
    )


def _product(chance: random.Random) -> tuple[str, str]:
    product = f"{chance.choice(KINDS)} {chance.choice(THINGS)} no. {chance.randint(1, 99)}"
    return product, product.replace(". ", "_").replace(" ", "_")


def _answer(chance: random.Random) -> str:
    rationale = " ".join(chance.sample(REASONS, k=chance.randint(1, 3)))
    action: dict[str, Any] = {"type": "click", "name": f"results.{_product(chance)[1]}.view_product"}
    return json.dumps({"rationale": rationale, "action": action})
