"""A verifiers environment on the example sessions: each is a task, and its reward is the service's.

    PYTHONPATH=examples vf-eval verifiers_env -m <model> --client.base-url <its URL> \
        --env.agent.runtime.type subprocess --no-push

The service's place comes from the environment, see docs/trainers/verifiers.md.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import verifiers.v1 as vf

from shopr1_client.trainers.verifiers import ShopR1Data, ShopR1Task

__all__ = ["OneTurn", "ShopR1Taskset"]  # verifiers looks here

SESSIONS = Path(__file__).with_name("sessions.jsonl")


class ShopR1Config(vf.TasksetConfig):  # type: ignore[misc]  # checked where there is no verifiers
    """`--env.taskset.sessions` names a file of your own: `prompt` and `ground_truth` in every line."""

    sessions: Path = SESSIONS


class ShopR1Taskset(vf.Taskset[ShopR1Task, ShopR1Config]):  # type: ignore[misc]
    """The sessions."""

    def load(self) -> Iterator[ShopR1Task]:
        for line in self.config.sessions.read_text("utf-8").splitlines():
            session = json.loads(line)
            data = ShopR1Data(
                name=session["id"], prompt=session["prompt"], ground_truth=session["ground_truth"]
            )
            yield ShopR1Task(data, self.config.task)


class OneTurn(vf.Harness[vf.HarnessConfig]):  # type: ignore[misc]
    """Asks the policy once, in this process. verifiers' own harnesses set up a program for every rollout."""

    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        messages = [message.model_dump(exclude_none=True) for message in data.prompt]
        async with httpx.AsyncClient(timeout=None) as policy:  # verifiers has timeouts of its own
            response = await policy.post(
                f"{endpoint}/chat/completions",
                json={"model": ctx.model, "messages": messages},
                headers={"Authorization": f"Bearer {secret}"},
            )
        response.raise_for_status()
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")
