"""Scores the example sessions with a real policy over HTTP, and prints what each rollout earned and why.

Run by `make demo`. Starts `shopr1 serve` on a free port of the loopback interface, waits until it is ready,
scores `sessions.jsonl` with the client library, and stops the server again.
"""

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shopr1_client import Client, ShopR1Error
from shopr1_client.wire import Group, Reward, ScoreRequest, Status
from shopr1_rewards import load_recipe

SESSIONS = Path(__file__).with_name("sessions.jsonl")
READY_TIMEOUT_S = 180.0
RULES = load_recipe("shop_r1").similarity


class ServerStartError(RuntimeError):
    """The server ended, or took too long, before it could score."""


@contextlib.contextmanager
def running_server() -> Iterator[str]:
    """The URL of a server of our own, ready to score; it ends with the block."""
    port = free_port()
    command = [sys.executable, "-m", "shopr1_service", "serve", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, process)
            yield url
        except ServerStartError:
            log.seek(0)
            sys.stderr.write(log.read())
            raise
        finally:
            process.terminate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    give_up_at = time.monotonic() + READY_TIMEOUT_S
    with Client(url) as client:
        while process.poll() is None and time.monotonic() < give_up_at:
            with contextlib.suppress(ShopR1Error):
                return client.wait_until_ready(timeout_s=1.0)
    raise ServerStartError("the server did not become ready")


def action_text(action: dict[str, str] | None) -> str:
    if action is None:
        return "-"
    attributes = ", ".join(f"{key}={value!r}" for key, value in action.items() if key != "type")
    return f"{action['type']}({attributes})"


def alikeness(name: str, similarity: float) -> str:
    """`text alike 0.750, does not pass`: what is not above the threshold earns nothing."""
    passes = RULES.thresholded(similarity) > 0
    return f"{name} alike {similarity:.3f}" + ("" if passes else ", does not pass")


def why(reward: Reward) -> str:
    """The reward in words: what was wrong, or how alike the values are."""
    details = reward.details
    if details.format_error is not None:
        return f"{details.format_error}: {details.format_message}"
    notes = [alikeness(name, value) for name, value in details.similarity.items() if value is not None]
    if not details.type_match:
        notes.append("unknown type" if details.unknown_action_type else "wrong type")
    notes += [f"{name} missing" for name in details.missing_attributes]
    notes += [f"extra key {key}" for key in details.extra_keys]
    if details.exact_match:
        notes.append("exact match")
    if details.self_certainty_nats is not None:
        notes.append(f"s = {details.self_certainty_nats:.2f} nats over {details.num_rationale_tokens} tokens")
    return "; ".join(notes)


def table(group: Group, rewards: list[Reward]) -> Table:
    truth = group.ground_truth  # JSON, or its text
    action = truth if isinstance(truth, str) else json.dumps(truth, ensure_ascii=False)
    title = f"{group.id}: the human did {action}"
    result = Table(title=title, title_justify="left", show_lines=True)
    for name in ("predicted", *rewards[0].components, "reward", "why"):
        result.add_column(name, justify="left" if name in ("predicted", "why") else "right", overflow="fold")
    for reward in rewards:
        terms = map(_number, reward.components.values())
        result.add_row(
            action_text(reward.details.predicted_action), *terms, _number(reward.reward), why(reward)
        )
    return result


def _number(value: float | None) -> str:
    return "null" if value is None else f"{value:.4g}" if value == 0 else f"{value:.4f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a running server; default: start one")
    url: str | None = parser.parse_args().url
    console = Console(width=None if sys.stdout.isatty() else 150)
    groups = [Group.model_validate_json(line) for line in SESSIONS.read_text("utf-8").splitlines()]
    with contextlib.ExitStack() as stack:
        if url is None:
            console.print("Starting a server on the embedded policy …")
            url = stack.enter_context(running_server())
        client = stack.enter_context(Client(url))
        start_s = time.perf_counter()
        response = client.score(ScoreRequest(groups=groups))
        duration_s = time.perf_counter() - start_s
    for group, scored in zip(groups, response.groups, strict=True):
        console.print(table(group, scored.rewards))
    rewards = [reward for scored in response.groups for reward in scored.rewards]
    console.print(
        f"Scored {len(rewards)} rollouts over {len(groups)} prompts in {duration_s:.1f} s with "
        f"{response.policy.model}, recipe {response.recipe.name} ({response.recipe.digest[:19]}…)."
    )
    console.print(
        "Each reward is the sum of the terms before it. self_certainty = 0.005 · s. A value earns its weight "
        f"times its alikeness (ROUGE-L F1) where that exceeds {RULES.threshold}."
    )
    return 0 if all(reward.status is Status.SCORED for reward in rewards) else 1


if __name__ == "__main__":
    sys.exit(main())
