"""Trains a policy on the example sessions with TRL's GRPOTrainer. The rewards come from a running service.

After each step the service gets the new weights, so its policy must be the one that is trained.

    $ shopr1 serve --policy HuggingFaceTB/SmolLM2-135M-Instruct
    $ pip install trl
    $ python examples/trl_grpo.py --url http://127.0.0.1:8000 --steps 3

A service with API keys takes the one in SHOPR1_CLIENT_API_KEY; its scope must be `admin`, which may change
the policy. With several processes: `accelerate launch`.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from shopr1_client.trainers.callback import PolicyPush
from shopr1_client.trainers.service import Service
from shopr1_client.trainers.trl import shop_r1_reward

SESSIONS = Path(__file__).with_name("sessions.jsonl")
READY_TIMEOUT_S = 600.0


def main() -> None:
    arguments = parse_arguments()
    # The shim finds the service by its environment: the reward function has no arguments of its own.
    os.environ["SHOPR1_CLIENT_URL"] = arguments.url
    client = Service.find().client()
    client.wait_until_ready(READY_TIMEOUT_S)
    trainer = GRPOTrainer(
        # Token ids are sent as they are: the service's policy has to have the same tokenizer.
        model=AutoModelForCausalLM.from_pretrained(arguments.policy, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(arguments.policy, padding_side="left"),
        reward_funcs=shop_r1_reward,
        train_dataset=Dataset.from_list(rows()),
        args=config(arguments),
        callbacks=[PolicyPush(client)] if arguments.push else [],
    )
    trainer.train()
    report(trainer.state.log_history)
    print(f"the service scores with version {client.policy().current.version}")


def rows() -> list[dict[str, Any]]:
    """A data set: the pages seen so far as `prompt`, and the human's action as `ground_truth`."""
    sessions = [json.loads(line) for line in SESSIONS.read_text("utf-8").splitlines()]
    return [
        {"prompt": session["prompt"], "ground_truth": text(session["ground_truth"])} for session in sessions
    ]


def text(action: Any) -> str:  # noqa: ANN401  # the sessions have it as an object or as JSON
    return action if isinstance(action, str) else json.dumps(action)


def config(arguments: argparse.Namespace) -> GRPOConfig:
    has_gpu = torch.cuda.is_available()
    return GRPOConfig(
        output_dir=arguments.output,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.group_size,
        num_generations=arguments.group_size,
        max_completion_length=128,  # an answer of these sessions has 50
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not has_gpu,
        bf16=has_gpu,
    )


def report(history: list[dict[str, Any]]) -> None:
    """Mean reward and terms of each step over its rollouts."""
    for entry in history:
        if "reward" in entry:
            terms = {key: value for key, value in entry.items() if key.startswith("shopr1/")}
            print(f"step {entry['step']}: reward {entry['reward']}, {json.dumps(terms)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service")
    parser.add_argument("--policy", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or directory")
    parser.add_argument("--steps", type=int, default=3, help="of the optimiser")
    parser.add_argument("--group-size", type=int, default=8, help="completions sampled from each prompt")
    parser.add_argument("--no-push", dest="push", action="store_false", help="leave the service as it is")
    parser.add_argument("--output", default="trl_grpo", help="directory for checkpoints and logs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
