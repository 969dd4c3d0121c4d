"""transformers' Trainer and its derivatives: the service's policy follows the trainer's weights.

    GRPOTrainer(…, callbacks=[PolicyPush("http://127.0.0.1:8000")])

Versions in TRL 1.16, which counts micro-steps. An optimiser step has `gradient_accumulation_steps` of them;
`global_step` is the number of optimiser steps.

1. At every micro-step that `steps_per_generation * num_iterations` divides, TRL samples completions with the
   current weights, version g = `global_step`, and requests their rewards before anything else. All the
   micro-steps that use these completions use these rewards.
2. The optimiser steps, `global_step` becomes g + 1, and only then this callback is called. It returns when
   the service scores with version g + 1.

With `every_n_steps=1`, rollouts are therefore always scored by the version that sampled them. With TRL's
defaults (`steps_per_generation` equals `gradient_accumulation_steps`, `num_iterations=1`), optimiser step n,
counted from 1, learns from rollouts that version n - 1 sampled and scored. In general the batch of rollouts
k, counted from 0, is sampled and scored by version

    g_k = ⌊k * steps_per_generation * num_iterations / gradient_accumulation_steps⌋

as long as no epoch ends within an optimiser step, also with several iterations or a reference model. With
`every_n_steps=N` the newest version that was sent scores, which is up to N - 1 steps older than the one that
samples. An evaluation runs after the callback: its rollouts are scored by the version that samples them.
After a resumption from a checkpoint the first version is the checkpoint's step.

TRL's asynchronous trainers, which sample while they train, do not have this order.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Literal, Unpack

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from shopr1_client.client import Client
from shopr1_client.errors import ShopR1Error
from shopr1_client.trainers.service import Service, note_version
from shopr1_client.updates.plan import UpdateOptions, plan
from shopr1_client.updates.weights import Module

_logger = logging.getLogger(__name__)


def _step(state: TrainerState) -> str:
    return str(state.global_step)


class PolicyPush(TrainerCallback):
    """Sends the weights before training and after every N-th optimiser step, and waits until they score.

    The main process sends. The others continue, and wait in their next collective operation: TRL has one
    before it requests rewards. For a model with PEFT's adapters only the active adapter is sent, as the
    default adapter, or all weights with `merge`.

    Args:
        client: a client, or the URLs of one or more servers, with defaults from the environment (see
            `trainers/service.py`). The key needs the scope `admin`.
        every_n_steps: N, at least 1.
        version: names the weights. Default: `global_step`.
        on_error: `raise` ends the training; `log` continues with the old weights in the service.
        options: see `UpdateOptions`.

    Raises (in every process, when training begins):
        ValueError: this process does not have the whole model, as with FSDP and DeepSpeed ZeRO-3.
        SettingsError: a setting of the client is invalid.
    """

    def __init__(
        self,
        client: Client | str | Sequence[str] | None = None,
        every_n_steps: int = 1,
        *,
        version: Callable[[TrainerState], str] = _step,
        on_error: Literal["raise", "log"] = "raise",
        **options: Unpack[UpdateOptions],
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}, and must be at least 1")
        self._client = client
        self._every_n_steps = every_n_steps
        self._version = version
        self._on_error = on_error
        self._options = options

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Module = None,
        **others: object,
    ) -> None:
        """Send the weights that sample the first rollouts."""
        # On every rank: if only one found that the model cannot be sent, the others would wait for it.
        plan(model, self._version(state), self._options)
        self._service()
        self._push(model, state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Module = None,
        **others: object,
    ) -> None:
        """Send the weights of the optimiser step."""
        if state.global_step % self._every_n_steps == 0:
            self._push(model, state)

    def _push(self, model: Module, state: TrainerState) -> None:
        version = self._version(state)
        note_version(state, version)
        if not state.is_world_process_zero:
            return
        try:
            self._send(model, version)
        except ShopR1Error as error:
            if self._on_error == "raise":
                raise
            _logger.error("the service continues without version %s: %r", version, error)

    def _send(self, model: Module, version: str) -> None:
        if isinstance(self._client, Client):
            self._client.update_policy(model, version, **self._options)
            return
        with self._service().client() as client:
            client.update_policy(model, version, **self._options)

    def _service(self) -> Service:
        urls = None if isinstance(self._client, Client) else self._client
        return Service.find(urls if urls is None or isinstance(urls, str) else ",".join(urls))
