"""Requests as the trainers send them, byte for byte, and the parts of a response that they use."""

import json
from typing import Any

import httpx

from shopr1_rewards import load_recipe
from tests.support.http import TERMINATE, answer

OPENRLHF = "/dialects/openrlhf/get_reward"
SLIME = "/dialects/slime/reward"
LLAMA_FACTORY = "/dialects/llama_factory/v1/score/evaluation"
VERIFY = "/dialects/nemo_gym/verify"

# Headers of these libraries. None of the trainers can add one of ours.
AIOHTTP = {
    "Accept": "*/*",
    "Accept-Encoding": "gzip, deflate",
    "User-Agent": "Python/3.12 aiohttp/3.13.2",
    "Content-Type": "application/json",
}
REQUESTS = {
    "User-Agent": "python-requests/2.32.5",
    "Accept-Encoding": "gzip, deflate",
    "Accept": "*/*",
    "Content-Type": "application/json",
}

LOG_KEYS = [
    *(f"shopr1/{term}" for term in load_recipe("shop_r1").components),
    "shopr1/self_certainty_nats",
    "shopr1/has_self_certainty",
    "shopr1/format_ok",
    "shopr1/type_match",
    "shopr1/exact_match",
    "shopr1/num_rationale_tokens",
    "shopr1/unscorable",
]
TOO_LONG = answer(rationale="x" * 400)
"""Does not fit into 200 tokens with any prompt; `FakePolicy` makes a token of each character."""
MAX_TOKENS = 200


def body(value: Any) -> bytes:
    """JSON as `json.dumps` writes it by default, and with it aiohttp and requests: spaces, escapes."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()


async def send(client: httpx.AsyncClient, path: str, value: Any, **params: str) -> httpx.Response:
    headers = REQUESTS if path == LLAMA_FACTORY else AIOHTTP
    return await client.post(path, content=body(value), headers=headers, params=params)


async def send_ok(client: httpx.AsyncClient, path: str, value: Any, **params: str) -> Any:
    """The decoded answer, under the conditions under which aiohttp decodes one."""
    response = await send(client, path, value, **params)
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "application/json"
    return response.json()


async def register(client: httpx.AsyncClient, *labels: tuple[Any, Any]) -> int:
    """Register ground truths for prompts; how many are held then."""
    entries = [{"prompt": prompt, "ground_truth": truth} for prompt, truth in labels]
    response = await client.put("/labels", json={"labels": entries})
    assert response.status_code == 200, response.text
    return int(response.json()["num_labels"])


def openrlhf(*rollouts: tuple[str, str, Any]) -> dict[str, Any]:
    """Prompt, completion and label of each."""
    return {
        "query": [prompt + completion for prompt, completion, _ in rollouts],
        "prompts": [prompt for prompt, _, _ in rollouts],
        "labels": [label for _, _, label in rollouts],
    }


def slime(prompt: Any = "page", response: str = answer(), label: Any = TERMINATE) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "label": label}


def llama_factory(*texts: str) -> dict[str, Any]:
    return {"model": "model", "messages": list(texts)}


def axolotl(prompt: str, completion: str, **row: Any) -> dict[str, Any]:
    """As Axolotl's reward function builds it: the row's fields, and a minimal request and response."""
    return {
        **row,
        "responses_create_params": {"input": [{"role": "user", "content": prompt}]},
        "response": {
            "id": "resp",
            "created_at": 0,
            "model": "axolotl",
            "object": "response",
            "output": [
                {
                    "id": "msg",
                    "role": "assistant",
                    "type": "message",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": completion, "annotations": []}],
                }
            ],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        },
    }


def request_of(path: str, completion: str = answer(), label: Any = TERMINATE) -> dict[str, Any]:
    """A request of the trainer behind a path, with one rollout. LLaMA-Factory needs "page" registered."""
    return {
        OPENRLHF: openrlhf(("page", completion, label)),
        SLIME: slime("page", completion, label),
        LLAMA_FACTORY: llama_factory("page" + completion),
        VERIFY: axolotl("page", completion, ground_truth=label),
    }[path]


def reward_in(path: str, answered: Any) -> float:
    """The reward that the trainer behind a path takes from an answer with one rollout."""
    match path:
        case "/dialects/openrlhf/get_reward":
            [reward] = answered["rewards"]
        case "/dialects/slime/reward":
            reward = answered
        case "/dialects/llama_factory/v1/score/evaluation":
            [reward] = answered["scores"]
        case _:
            reward = answered["reward"]
    assert isinstance(reward, float)
    return reward
