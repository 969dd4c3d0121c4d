"""The callback, in transformers' own Trainer and against a server behind a real socket."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments

from shopr1_client import Client
from shopr1_client.errors import InvalidWeightsError
from shopr1_client.trainers.callback import PolicyPush
from shopr1_client.trainers.service import noted_version
from tests.support.models import random_ids, tiny_model
from tests.support.policy_server import PolicyServer, policy_server

NUM_STEPS = 4


class Watch(TrainerCallback):
    """Comes after the callback that is tested: what is there then, at the beginning and after each step."""

    def __init__(self, look: Callable[[TrainerState, PreTrainedModel], None]) -> None:
        self._look = look

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._look(state, kwargs["model"])

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._look(state, kwargs["model"])


def train(directory: Path, *callbacks: TrainerCallback, **options: Any) -> None:
    rows = [{"input_ids": random_ids(8, seed=i), "labels": random_ids(8, seed=i)} for i in range(NUM_STEPS)]
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=NUM_STEPS,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        save_strategy=options.pop("save_strategy", "no"),
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    dataset: Any = rows
    trainer = Trainer(tiny_model(), arguments, train_dataset=dataset, callbacks=list(callbacks))
    trainer.train(**options)


def sent(server: PolicyServer) -> list[str]:
    return [request.query["version"] for request in server.received]


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_server_has_the_weights_of_every_step(tmp_path: Path) -> None:
    seen: list[tuple[int, str, dict[str, Tensor]]] = []
    with policy_server() as server:
        watch = Watch(
            lambda state, model: seen.append((state.global_step, server.policy.base.version, copied(model)))
        )
        train(tmp_path, PolicyPush(server.url), watch)
    assert [(step, version) for step, version, _ in seen] == [(i, str(i)) for i in range(NUM_STEPS + 1)]
    assert sent(server) == [str(i) for i in range(NUM_STEPS + 1)]
    for request, (_, _, expected) in zip(server.received, seen, strict=True):
        tensors = safetensors.torch.load(request.body)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    heads = [weights["lm_head.weight"] for _, _, weights in seen]
    assert all(not torch.equal(heads[i], heads[i + 1]) for i in range(NUM_STEPS))


def test_every_third_step_under_names_of_ones_own(tmp_path: Path) -> None:
    noted: list[str | None] = []
    with policy_server() as server, Client(server.url) as client:
        push = PolicyPush(client, 3, version=lambda state: f"run-7/{state.global_step}")
        train(tmp_path, push, Watch(lambda state, _: noted.append(noted_version(state))))
    assert sent(server) == ["run-7/0", "run-7/3"]
    assert noted == ["run-7/0"] * 3 + ["run-7/3"] * 2


def test_a_run_that_is_resumed(tmp_path: Path) -> None:
    with policy_server() as server:
        train(tmp_path, save_strategy="steps")  # no step is saved but the last
        checkpoint = str(tmp_path / f"checkpoint-{NUM_STEPS}")
        train(tmp_path, PolicyPush(server.url), resume_from_checkpoint=checkpoint)
    assert sent(server) == [str(NUM_STEPS)]


def test_several_servers(tmp_path: Path) -> None:
    with policy_server() as one, policy_server() as two:
        train(tmp_path, PolicyPush([one.url, two.url], every_n_steps=NUM_STEPS))
    assert sent(one) == sent(two) == ["0", str(NUM_STEPS)]


def test_the_environment_names_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with policy_server() as server:
        monkeypatch.setenv("SHOPR1_CLIENT_URL", server.url)
        monkeypatch.setenv("SHOPR1_CLIENT_API_KEY", "callback-0123456789")  # pragma: allowlist secret
        train(tmp_path, PolicyPush(every_n_steps=NUM_STEPS))
    assert sent(server) == ["0", str(NUM_STEPS)]
    assert server.received[0].headers["authorization"] == "Bearer callback-0123456789"


def test_an_error_ends_the_training(tmp_path: Path) -> None:
    with policy_server(InvalidWeightsError("shape")) as server, pytest.raises(InvalidWeightsError):
        train(tmp_path, PolicyPush(server.url))
    assert sent(server) == ["0"]


def test_an_error_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with policy_server(InvalidWeightsError("shape")) as server, caplog.at_level(logging.ERROR):
        train(tmp_path, PolicyPush(server.url, every_n_steps=NUM_STEPS, on_error="log"))
    assert sent(server) == ["0", str(NUM_STEPS)]
    [record] = [record for record in caplog.records if record.name == "shopr1_client.trainers.callback"]
    assert record.getMessage().startswith("the service continues without version 0: InvalidWeightsError(")


@pytest.mark.parametrize("is_main", [True, False])
def test_every_rank_sees_that_a_model_is_not_whole(is_main: bool) -> None:
    """Were it the main process alone, the others would wait for it."""
    model = nn.Linear(2, 2)
    model.weight.data = torch.empty(0)
    state: Any = TrainerState(is_world_process_zero=is_main)
    arguments: Any = None
    with policy_server() as server, pytest.raises(ValueError, match="ZeRO-3"):
        PolicyPush(server.url, on_error="log").on_train_begin(arguments, state, arguments, model=model)
    assert server.received == []


def test_only_the_main_process_sends() -> None:
    state: Any = TrainerState(is_world_process_zero=False, global_step=3)
    arguments: Any = None
    with policy_server() as server:
        PolicyPush(server.url).on_step_end(arguments, state, arguments, model=nn.Linear(2, 2))
    assert server.received == []
    assert noted_version(state) == "3"


def test_a_wrong_number_of_steps() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        PolicyPush(every_n_steps=0)
