"""Plan of a policy update: the request that sends it, and how to find it among the loaded versions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

import httpx
from pydantic import BaseModel

from shopr1_client.updates.adapted import active_adapter, is_adapted, of_adapter, of_merged
from shopr1_client.updates.transfer import DEFAULT_TIMEOUT_S, Transfer
from shopr1_client.updates.verification import Probe
from shopr1_client.updates.weights import Weights, of_module, of_tensors
from shopr1_client.wire_policy import (
    AdapterRequest,
    AdapterUpdate,
    PolicyState,
    PolicyUpdate,
    UpdateRequest,
    VersionInfo,
)

Source = Any
"""A torch module, its gathered state, or the path of a directory that the service can read."""
Answer = PolicyUpdate | AdapterUpdate
Send = Callable[[httpx.Client, str], httpx.Response]
"""Sends an update through a client to a server's URL."""


class UpdateOptions(TypedDict, total=False):
    """Options of an update.

    Attributes:
        partial: the policy's other tensors keep their values. Default: no.
        transport: `http`, or a broadcast by torch.distributed with the backend `gloo` or `nccl`. Default:
            `http`.
        adapter: name of the LoRA adapter that is updated. Default: a model with adapters sends the active one
            under its own name; everything else updates the policy itself.
        merge: a model with adapters sends all its weights with the active adapters merged, on copies of
            single layers. Default: no.
        verify: compare the self-certainty of a probe by the model with each server's, after it was updated;
            a number is the largest difference allowed at a token, nats. Needs the scope `score`. Default: no.
        default: the adapter scores requests that name none. Default: yes.
        host: this machine's address for a broadcast, as the servers see it. Default: its address on the route
            to them.
        timeout_s: time limit of a broadcast. Default: 300.
    """

    partial: bool
    merge: bool
    verify: bool | float
    transport: Literal["http", "gloo", "nccl"]
    adapter: str | None
    default: bool
    host: str | None
    timeout_s: float


@dataclass(frozen=True)
class Change:
    """An update of a server's policy.

    Attributes:
        adapter: name; None: the policy's own weights.
        send: sends it; may be called again.
        num_tensors, num_bytes: 0 where only the service knows them.
        probe: compares the server with the model afterwards.
    """

    version: str
    adapter: str | None
    send: Send
    num_tensors: int = 0
    num_bytes: int = 0
    probe: Probe | None = None

    @property
    def answer(self) -> type[Answer]:
        return PolicyUpdate if self.adapter is None else AdapterUpdate

    def find_in(self, state: PolicyState, since: int) -> VersionInfo | None:
        """Version that this update loaded, if there is one with a number above `since`."""
        loaded = [state.base] if self.adapter is None else reversed(state.adapters)
        wanted = (self.version, self.adapter)
        own = (i for i in loaded if (i.version, i.adapter) == wanted and i.number > since)
        return next(own, None)

    def to_answer(self, current: VersionInfo, former: VersionInfo, duration_s: float) -> Answer:
        """Replacement of a response that was lost."""
        if self.adapter is not None:
            return AdapterUpdate(
                current=current, rank=0, num_layers=0, num_bytes=self.num_bytes, duration_s=duration_s
            )
        return PolicyUpdate(
            current=current,
            former=former,
            num_tensors=self.num_tensors,
            num_bytes=self.num_bytes,
            duration_s=duration_s,
            pause_s=None,
        )


def newest_number(state: PolicyState) -> int:
    """Largest version number that a server has loaded."""
    return max(info.number for info in (state.current, state.base, *state.adapters))


def plan(source: Source, version: str, options: UpdateOptions) -> Change:
    """Plan an update of the policy, or of an adapter.

    Raises:
        UnsendableModelError: a model of PEFT's computes with more than its adapter, or not with it.
        ValueError: these weights cannot be sent, or not in this way; the message gives the remedy.
    """
    change, verify = _plan(source, version, options), options.get("verify", False)
    if verify is False:
        return change
    is_model = hasattr(source, "get_input_embeddings") or hasattr(source, "module")
    _check(is_model, "only a model of transformers' can be verified, by its own forward")
    return replace(change, probe=Probe(source, change.adapter, None if verify is True else verify))


def _plan(source: Source, version: str, options: UpdateOptions) -> Change:
    adapter, is_http = options.get("adapter"), options.get("transport", "http") == "http"
    if isinstance(source, str | Path):
        _check(is_http, "the service reads a path itself: no transport is needed")
        return _checkpoint(str(source), version, options)
    is_module = not isinstance(source, Mapping)
    has_adapters = is_module and is_adapted(source)
    if has_adapters and not options.get("merge"):
        _check(is_http, "an adapter is sent by HTTP only")
        return _adapter(source, version, options)
    _check(adapter is None, "neither an adapter's path nor a model of PEFT's: there is no adapter in it")
    weights = of_merged(source) if has_adapters else of_module(source) if is_module else of_tensors(source)
    return _streamed(weights, version, options) if is_http else _broadcast(weights, version, options)


def _check(is_right: bool, message: str) -> None:
    if not is_right:
        raise ValueError(message)


def _checkpoint(path: str, version: str, options: UpdateOptions) -> Change:
    name = options.get("adapter")
    if name is None:
        body = UpdateRequest(path=path, version=version, partial=options.get("partial", False))
        return Change(version, None, partial(_post, "/policy/update", body))
    _check(not options.get("partial"), "an adapter is loaded as a whole")
    own = AdapterRequest(name=name, path=path, version=version, default=options.get("default", True))
    return Change(version, name, partial(_post, "/policy/adapters", own))


def _adapter(module: Any, version: str, options: UpdateOptions) -> Change:  # noqa: ANN401  # a torch module
    _check(not options.get("partial"), "an adapter is loaded as a whole")
    name = options.get("adapter") or active_adapter(module)
    weights, params = of_adapter(module), {"version": version, "default": _bool(options.get("default", True))}
    return _change(version, name, partial(_put, f"/policy/adapters/{name}", params, weights), weights)


def _streamed(weights: Weights, version: str, options: UpdateOptions) -> Change:
    params = {"version": version, "partial": _bool(options.get("partial", False))}
    return _change(version, None, partial(_put, "/policy/weights", params, weights), weights)


def _broadcast(weights: Weights, version: str, options: UpdateOptions) -> Change:
    transfer = Transfer(
        weights,
        version,
        partial=options.get("partial", False),
        backend="nccl" if options["transport"] == "nccl" else "gloo",
        host=options.get("host"),
        timeout_s=options.get("timeout_s", DEFAULT_TIMEOUT_S),
    )
    return _change(version, None, transfer.send, weights)


def _change(version: str, adapter: str | None, send: Send, weights: Weights) -> Change:
    return Change(version, adapter, send, len(weights.tensors), weights.num_bytes)


def _post(path: str, body: BaseModel, http: httpx.Client, url: str) -> httpx.Response:
    return http.post(url + path, content=body.model_dump_json())


def _put(
    path: str, params: Mapping[str, str], weights: Weights, http: httpx.Client, url: str
) -> httpx.Response:
    num_bytes = len(weights.header) + weights.num_bytes
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(num_bytes)}
    return http.put(url + path, params=params, content=weights.chunks(), headers=headers)


def _bool(value: bool) -> str:
    return "true" if value else "false"
