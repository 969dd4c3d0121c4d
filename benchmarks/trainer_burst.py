"""A batch as OpenRLHF sends it: every rollout in a request and on a connection of its own, all at once."""

import asyncio
import json

import httpx

from meters import in_turns_s
from report import Report
from serving import REQUEST_TIMEOUT_S, Body, score, served
from subject import Subject
from workloads import Shape

ROUTE = "/dialects/openrlhf/get_reward"
TRUTH = {"type": "terminate"}
SHAPE = Shape(256, 64, 16)
NUM_PROMPTS = 32

Batch = dict[str, list[str]]
"""Completions by prompt, as text: OpenRLHF sends no ids."""


def trainer_burst(subject: Subject, num_runs: int, report: Report) -> None:
    """2,048 requests against one `/score` request of 32 groups; all prompts are unknown."""
    settings = subject.settings.model_copy(update={"max_queue_tokens": 2**22})
    with served(settings, subject.policy) as client:
        url = str(client.base_url)
        groups_s, burst_s = in_turns_s(
            num_runs,
            lambda: score(client, _groups(_batch(subject))),
            lambda: asyncio.run(_send_all(url, _batch(subject))),
        )
    workload = f"{NUM_PROMPTS} prompts {SHAPE}"
    report.note(workload, "one request", groups_s, "s")
    report.note(workload, f"{NUM_PROMPTS * SHAPE.G} OpenRLHF requests / one request", burst_s / groups_s, "x")


def _batch(subject: Subject) -> Batch:
    tokenizer = subject.tokenizer
    completions = [str(tokenizer.decode(ids)) for ids in subject.workloads.completions(SHAPE)]
    prompts = [str(tokenizer.decode(subject.workloads.prompt_ids(SHAPE.P))) for _ in range(NUM_PROMPTS)]
    return dict.fromkeys(prompts, completions)


def _groups(batch: Batch) -> Body:
    return {
        "groups": [
            {"prompt": prompt, "ground_truth": TRUTH, "completions": completions}
            for prompt, completions in batch.items()
        ]
    }


async def _send_all(url: str, batch: Batch) -> None:
    bodies = [
        {"query": [prompt + completion], "prompts": [prompt], "labels": [json.dumps(TRUTH)]}
        for prompt, completions in batch.items()
        for completion in completions
    ]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    timeout = httpx.Timeout(REQUEST_TIMEOUT_S)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=timeout) as client:
        answers = await asyncio.gather(*(client.post(ROUTE, json=body) for body in bodies))
    assert all(answer.raise_for_status().json()["rewards"][0] > 0 for answer in answers)
