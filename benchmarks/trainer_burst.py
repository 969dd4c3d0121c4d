"""A batch as OpenRLHF sends it: every rollout in a request and on a connection of its own, all at once."""

import asyncio
import json
from typing import Any

import httpx

from meters import in_turns_s
from report import Report
from serving import Body, score, served
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
        json.dumps(
            {"query": [prompt + completion], "prompts": [prompt], "labels": [json.dumps(TRUTH)]}
        ).encode()
        for prompt, completions in batch.items()
        for completion in completions
    ]
    address = httpx.URL(url)
    answers = await asyncio.gather(*(_send(address.host, address.port or 80, body) for body in bodies))
    assert all(answer["rewards"][0] > 0 for answer in answers)


async def _send(host: str, port: int, body: bytes) -> Any:  # noqa: ANN401
    """Over a bare socket: a trainer's own cost is not what is measured, and its process is another one."""
    reader, writer = await asyncio.open_connection(host, port)
    head = (
        f"POST {ROUTE} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    status, _, rest = answer.partition(b"\r\n")
    assert status == b"HTTP/1.1 200 OK", answer
    return json.loads(rest.partition(b"\r\n\r\n")[2])
