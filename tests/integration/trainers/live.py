"""Rollouts and their rewards from `POST /score`, which each trainer must receive."""

import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from shopr1_client.reward_logs import log_keys
from shopr1_rewards import load_recipe

ROOT = Path(__file__).parents[3]
API_KEY = "trainers-0123456789abcdef"  # pragma: allowlist secret
TIMEOUT_S = 600.0
LOG_KEYS = log_keys(load_recipe("shop_r1").components)

ROUNDING = 1e-7
"""Absolute. Values depend on the batch by 1e-6 nats (docs/engine.md): 5e-9 of the reward."""
TOO_LONG = [{"role": "user", "content": "mug " * 20_000}]
"""Longer than the limit of the embedded policy: rollouts of this prompt are unscorable."""


@dataclass(frozen=True)
class Rollout:
    """A completion of an example session."""

    prompt: Any
    completion: Any
    ground_truth: dict[str, str]

    @property
    def label(self) -> str:
        """The ground truth as a string, for a data set with text columns."""
        return json.dumps(self.ground_truth)


@dataclass(frozen=True)
class Live:
    """A running service."""

    url: str

    @property
    def keyed_url(self) -> str:
        """URL with the key, for trainers that cannot send headers."""
        return f"{self.url}/key/{API_KEY}"

    def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
        """Results of `POST /score`, one request per rollout and without the client library."""
        return [self._score(rollout) for rollout in rollouts]

    def rewards(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        return [reward["reward"] for reward in self.score(rollouts)]

    def _score(self, rollout: Rollout) -> dict[str, Any]:
        group = {
            "prompt": rollout.prompt,
            "ground_truth": rollout.ground_truth,
            "completions": [rollout.completion],
        }
        response = httpx.post(f"{self.keyed_url}/score", json={"groups": [group]}, timeout=TIMEOUT_S)
        response.raise_for_status()
        reward: dict[str, Any] = response.json()["groups"][0]["rewards"][0]
        return reward


def sessions() -> list[dict[str, Any]]:
    """The example sessions: messages as prompt, the human's action, good and bad completions."""
    lines = (ROOT / "examples" / "sessions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def rollouts() -> list[Rollout]:
    """Every completion of the example sessions."""
    return [
        Rollout(session["prompt"], completion, session["ground_truth"])
        for session in sessions()
        for completion in session["completions"]
    ]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def command(port: int) -> list[str]:
    """Command that starts a service in the project's own environment."""
    return [str(ROOT / ".venv" / "bin" / "shopr1"), "serve", "--port", str(port)]
