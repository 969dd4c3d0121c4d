"""A training batch as OpenRLHF sends it: one request and one connection per rollout, all at once.

Run as `python -m benchmarks.serving.trainer_burst`.
"""

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from benchmarks.meters import interleaved_s
from benchmarks.report import Report
from benchmarks.serving.local_server import Body, score, served
from benchmarks.subject import Subject, load_subject
from benchmarks.workloads import PLANS, Shape

FOLDER = Path(__file__).parent
ROUTE = "/dialects/openrlhf/get_reward"
TRUTH = {"type": "terminate"}
SHAPE, TINY_SHAPE = Shape(256, 64, 16), Shape(64, 4, 16)
NUM_PROMPTS, NUM_TINY_PROMPTS = 32, 2

Batch = dict[str, list[str]]
"""Completions by prompt, as text: OpenRLHF sends no token ids."""


def main() -> None:
    parser = argparse.ArgumentParser(description="A burst of single rollouts against one request.")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--runs", type=int, default=3, help="runs, of which the median is reported")
    parser.add_argument("--tiny", action="store_true", help="a small batch that shows that everything runs")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    options = parser.parse_args()
    shape, num_prompts = (TINY_SHAPE, NUM_TINY_PROMPTS) if options.tiny else (SHAPE, NUM_PROMPTS)
    subject = load_subject(options.dtype, PLANS["tiny"])
    report = Report(subject.device, options.dtype)
    subject.run_new_prompt(TINY_SHAPE)
    trainer_burst(subject, shape, num_prompts, options.runs, report)
    report.write(options.output / "trainer_burst.csv")


def trainer_burst(subject: Subject, shape: Shape, num_prompts: int, num_runs: int, report: Report) -> None:
    """One request per rollout against one `/score` request with all groups. No prompt is cached."""
    settings = subject.settings.model_copy(update={"max_queue_tokens": 2**22})
    with served(settings, subject.policy) as client:
        url = str(client.base_url)
        groups_s, burst_s = interleaved_s(
            num_runs,
            lambda: score(client, _groups(_batch(subject, shape, num_prompts))),
            lambda: asyncio.run(_send_all(url, _batch(subject, shape, num_prompts))),
        )
    workload = f"{num_prompts} prompts {shape}"
    report.add(workload, "one request", groups_s, "s")
    report.add(workload, f"{num_prompts * shape.G} OpenRLHF requests / one request", burst_s / groups_s, "x")


def _batch(subject: Subject, shape: Shape, num_prompts: int) -> Batch:
    tokenizer = subject.tokenizer
    completions = [str(tokenizer.decode(ids)) for ids in subject.workloads.completions(shape)]
    prompts = [str(tokenizer.decode(subject.workloads.prompt_ids(shape.P))) for _ in range(num_prompts)]
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
    responses = await asyncio.gather(*(_send(address.host, address.port or 80, body) for body in bodies))
    assert all(response["rewards"][0] > 0 for response in responses)


async def _send(host: str, port: int, body: bytes) -> Any:  # noqa: ANN401
    """Send one request over a bare socket: an HTTP client would add its own CPU time to this process."""
    reader, writer = await asyncio.open_connection(host, port)
    head = (
        f"POST {ROUTE} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    response = await reader.read()
    writer.close()
    status, _, rest = response.partition(b"\r\n")
    assert status == b"HTTP/1.1 200 OK", response
    return json.loads(rest.partition(b"\r\n\r\n")[2])


if __name__ == "__main__":
    main()
