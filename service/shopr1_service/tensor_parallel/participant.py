"""One of the processes that hold a policy together: a thread in the one that serves, a process else."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore
from transformers import DistributedConfig

from shopr1_service.agreement import Agreement
from shopr1_service.building import build_policy
from shopr1_service.device import choose_device
from shopr1_service.engine import FatalEngineError, is_out_of_memory
from shopr1_service.errors import PolicyError
from shopr1_service.loaded_policy import LoadedPolicy
from shopr1_service.loading import load_model
from shopr1_service.settings import Settings
from shopr1_service.startup import Startup
from shopr1_service.tensor_parallel.messages import (
    Done,
    Failed,
    Least,
    Load,
    Measure,
    Outcome,
    Tried,
    Verdict,
)

LOOPBACK = "127.0.0.1"


class Channel(Protocol):
    """Messages to and from the coordinator. `recv` raises `EOFError` when it is gone."""

    def recv(self) -> Any: ...  # noqa: ANN401

    def send(self, message: Any, /) -> None: ...  # noqa: ANN401


class Participant(Agreement):
    """Does what the coordinator says, until it is gone.

    Args:
        store: rank 0's, which the others connect to.
        startup: is told how far loading is.
        prepare: called when the settings are known.

    Attributes:
        policy: once it is loaded. It has this rank's part of the weights.
    """

    def __init__(
        self,
        rank: int,
        channel: Channel,
        *,
        store: Store | None = None,
        startup: Startup | None = None,
        prepare: Callable[[Settings], None] = lambda settings: None,
    ) -> None:
        self.policy: LoadedPolicy | None = None
        self._rank = rank
        self._channel = channel
        self._store = store
        self._startup = startup
        self._prepare = prepare

    def run(self) -> None:
        """Returns when the coordinator is gone."""
        try:
            while True:
                self._channel.send(self._answer(self._channel.recv()))
        except (EOFError, OSError):
            self.policy = None
            if dist.is_initialized():
                dist.destroy_process_group()

    def least(self, number: int) -> int:
        self._channel.send(Least(number))
        return int(self._channel.recv())

    def settle(self, error: Exception | None) -> None:
        try:
            self._channel.send(Tried(_outcome(error), _num_collectives(), _text(error)))
            verdict = self._channel.recv()
        except (EOFError, OSError) as loss:
            raise FatalEngineError("the coordinator is gone") from loss
        if error is None and verdict is Verdict.TRY_AGAIN:
            raise torch.OutOfMemoryError("another device ran out of memory")

    def _answer(self, task: Load | Measure) -> Done | Failed:
        try:
            if isinstance(task, Load):
                return self._load(task)
            assert self.policy is not None
            measured = self.policy.certainties(task.groups, task.rules)
        except EOFError:  # in the middle of a task
            raise
        except Exception as error:
            return Failed(_text(error), isinstance(error, PolicyError))
        return Done(measured if self._rank == 0 else None)

    def _load(self, task: Load) -> Done:
        settings = Settings(**task.settings)
        self._prepare(settings)
        device = choose_device(settings.device)
        if device.type == "cpu":
            torch.set_num_threads(task.num_threads)
        self.least(0)  # starting takes each its own time, as does reading; what follows either has a limit
        # What transformers and gloo look at.
        with _environment({"LOCAL_RANK": str(self._rank), "GLOO_SOCKET_IFNAME": "lo"}):
            self._join(task, device.type, timedelta(seconds=settings.engine_timeout_s))
            distributed = DistributedConfig(tp_size=task.num_ranks, tp_plan=dict(task.overrides))
            tokenizer, model = load_model(task.source, settings, distributed)
        self.least(0)
        self.policy = build_policy(
            model, tokenizer, settings, name=task.source.name, startup=self._startup, agreement=self
        )
        if not _num_collectives():
            raise PolicyError(f"transformers' plan splits nothing of {self.policy.info.architecture}")
        return Done(self.policy.info.model_copy(update={"device": device.type}))

    def _join(self, task: Load, device_type: str, timeout: timedelta) -> None:
        device = torch.device(device_type, self._rank) if device_type == "cuda" else None
        if device is not None:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "gloo" if device is None else "nccl",
            store=self._store or TCPStore(LOOPBACK, task.port, is_master=False, timeout=timeout),
            rank=self._rank,
            world_size=task.num_ranks,
            timeout=timeout,
            device_id=device,
        )


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    former = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in former.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _num_collectives() -> int:
    group = dist.group.WORLD
    assert group is not None
    number: int = group._get_sequence_number_for_group()  # type: ignore[attr-defined]  # it is not listed
    return number


def _outcome(error: Exception | None) -> Outcome:
    if error is None:
        return Outcome.GOOD
    return Outcome.OUT_OF_MEMORY if is_out_of_memory(error) else Outcome.FAILED


def _text(error: Exception | None) -> str:
    if error is None or isinstance(error, PolicyError | FatalEngineError):
        return str(error or "")
    return f"{type(error).__name__}: {error}"
