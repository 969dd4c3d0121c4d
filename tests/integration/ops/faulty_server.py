"""`shopr1 serve` with a model that fails regularly while the file `FAULTY_WHILE` exists. `FAULT` is one of:

memory      PyTorch reports that it is out of memory
exception   the model raises
nan         the model's last hidden states are NaN
hang        a pass does not return
"""

import itertools
import os
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from shopr1_service.engine.lm_head import trunk_of
from shopr1_service.policy import factory as building
from shopr1_service.policy import loading
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.server import uvicorn_server as server
from shopr1_service.settings import load_settings

FAULTS = ("memory", "exception", "nan")
_EVERY = 3
"""One in so many passes fails, so that some groups also fail in their retry."""


class Fault:
    """A forward hook of the model's trunk."""

    def __init__(self, name: str, switch: Path) -> None:
        self._name = name
        self._switch = switch
        self._passes = itertools.count()

    def __call__(self, _module: torch.nn.Module, _args: object, output: Any) -> Any:
        if not self._switch.exists() or next(self._passes) % _EVERY:
            return output
        match self._name:
            case "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            case "exception":
                raise RuntimeError("the model has failed")
            case "hang":
                threading.Event().wait()
        output.last_hidden_state.fill_(float("nan"))
        return output


def main() -> int:
    fault = Fault(os.environ["FAULT"], Path(os.environ["FAULTY_WHILE"]))
    build = building.build_policy

    def build_faulty(model: Any, *args: Any, **options: Any) -> LoadedPolicy:
        policy = build(model, *args, **options)
        trunk_of(model).register_forward_hook(fault)
        return policy

    with mock.patch.object(loading, "build_policy", build_faulty):
        return server.serve(load_settings())


if __name__ == "__main__":
    sys.exit(main())
