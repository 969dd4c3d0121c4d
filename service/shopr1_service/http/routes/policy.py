"""Routes that update the policy; all but `GET /policy` need a key with the scope `admin`."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Body, Path, Query, Request
from starlette.requests import ClientDisconnect

from shopr1_client.errors import (
    InternalError,
    InvalidRequestError,
    NotFoundError,
    NotReadyError,
)
from shopr1_client.wire_policy import (
    AdapterName,
    AdapterRequest,
    AdapterUpdate,
    PolicyState,
    PolicyUpdate,
    TransferRequest,
    UpdateRequest,
    VersionName,
)
from shopr1_service.http import examples
from shopr1_service.http.deadline import ClientDisconnectedError
from shopr1_service.http.json_body import JsonRoute
from shopr1_service.http.problem_responses import CHANGE_PROBLEMS, problem_responses
from shopr1_service.http.state import AppState

TAG = "policy"
router = APIRouter(tags=[TAG], route_class=JsonRoute)
stream_router = APIRouter(tags=[TAG], route_class=JsonRoute)
"""Routes with bodies of any size: they are streamed; their header bounds them."""

Version = Annotated[VersionName, Query(description="The version's name, as it appears in every response.")]
Name = Annotated[AdapterName, Path(description="The adapter's name.")]

_SAFETENSORS = {
    "requestBody": {
        "required": True,
        "description": "A safetensors file.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.get(
    "/policy",
    operation_id="policy",
    summary="Loaded versions, and the progress of an update",
    responses=problem_responses(InternalError, NotReadyError),
)
async def policy(state: AppState) -> PolicyState:
    """Versions of the policy's weights and of adapters on them."""
    return state.policy_state


@router.post(
    "/policy/update",
    operation_id="updatePolicy",
    summary="Load the weights of a checkpoint",
    responses=CHANGE_PROBLEMS,
)
async def update(
    body: Annotated[UpdateRequest, Body(openapi_examples=examples.UPDATE_REQUESTS)], state: AppState
) -> PolicyUpdate:
    """Loads weights from a directory below one of the service's `policy_roots`.

    Everything is checked before anything changes. The response is sent when the new weights score.
    """
    return await state.engine.load_checkpoint(body)


@stream_router.put(
    "/policy/weights",
    operation_id="uploadWeights",
    summary="Upload new weights",
    responses=CHANGE_PROBLEMS,
    openapi_extra=_SAFETENSORS,
)
async def upload(
    request: Request,
    state: AppState,
    version: Version,
    partial: Annotated[bool, Query(description="Some tensors only; the others keep their values.")] = False,
) -> PolicyUpdate:
    """Loads weights from one safetensors file with the names of `model.state_dict()`.

    The body is streamed in bounded memory. If the connection breaks, nothing has changed.
    """
    return await state.engine.load_upload(_blocks(request), version, is_partial=partial)


@router.post(
    "/policy/transfer",
    operation_id="transferWeights",
    summary="Receive weights that a trainer broadcasts",
    responses=CHANGE_PROBLEMS,
)
async def transfer(
    body: Annotated[TransferRequest, Body(openapi_examples=examples.TRANSFER_REQUESTS)], state: AppState
) -> PolicyUpdate:
    """Joins the trainer's torch.distributed group of two, and loads the tensors that it broadcasts."""
    return await state.engine.receive_broadcast(body)


@router.post(
    "/policy/adapters",
    operation_id="loadAdapter",
    summary="Load a LoRA adapter from a directory",
    responses=CHANGE_PROBLEMS,
)
async def load_adapter(
    body: Annotated[AdapterRequest, Body(openapi_examples=examples.ADAPTER_REQUESTS)], state: AppState
) -> AdapterUpdate:
    """Loads an adapter as PEFT saves it, from below one of the service's `policy_roots`.

    If the name is known, this is a further version of it; the last `adapter_versions` stay loaded.
    """
    return await state.engine.load_adapter(body)


@stream_router.put(
    "/policy/adapters/{name}",
    operation_id="uploadAdapter",
    summary="Upload a LoRA adapter",
    responses=CHANGE_PROBLEMS,
    openapi_extra=_SAFETENSORS,
)
async def upload_adapter(
    name: Name,
    request: Request,
    state: AppState,
    version: Annotated[VersionName | None, Query(description="Default: its number.")] = None,
    default: Annotated[
        bool, Query(description="From now on it scores requests that name no adapter.")
    ] = False,
) -> AdapterUpdate:
    """Loads PEFT's `adapter_model.safetensors`, with its config as `adapter_config` in the metadata."""
    wanted = AdapterRequest(name=name, path="-", version=version, default=default)
    return await state.engine.load_uploaded_adapter(_blocks(request), wanted)


@router.delete(
    "/policy/adapters/{name}",
    operation_id="unloadAdapter",
    summary="Unload a LoRA adapter",
    responses=problem_responses(NotFoundError, InvalidRequestError, InternalError, NotReadyError),
)
async def unload_adapter(
    name: Name,
    state: AppState,
    version: Annotated[VersionName | None, Query(description="Default: all versions.")] = None,
) -> PolicyState:
    """Unloads it: requests that name it get 422; requests without a name are scored without it."""
    await state.engine.unload_adapter(name, version)
    return state.policy_state


async def _blocks(request: Request) -> AsyncIterator[bytes]:
    """Blocks of a request's body.

    Raises:
        ClientDisconnectedError: the client disconnected before its end.
    """
    try:
        async for block in request.stream():
            yield block
    except ClientDisconnect:
        raise ClientDisconnectedError from None
