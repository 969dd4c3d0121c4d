"""The routes by which the policy changes. All but the reading one need a key with the admin scope."""

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
from shopr1_service.http.problem_responses import CHANGE_PROBLEMS, problem_responses
from shopr1_service.http.state import AppState

TAG = "policy"
router = APIRouter(tags=[TAG])
stream_router = APIRouter(tags=[TAG])
"""Bodies of any size: they are taken piece by piece, and bounded by what their header may announce."""

Version = Annotated[VersionName, Query(description="The version's name; stands in every answer.")]
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
    summary="What is loaded, and whether an update is under way",
    responses=problem_responses(InternalError, NotReadyError),
)
async def policy(state: AppState) -> PolicyState:
    """Versions of the policy's weights and of adapters on them."""
    return state.policy_state


@router.post(
    "/policy/update",
    operation_id="updatePolicy",
    summary="Take the weights of a checkpoint",
    responses=CHANGE_PROBLEMS,
)
async def update(
    body: Annotated[UpdateRequest, Body(openapi_examples=examples.UPDATE_REQUESTS)], state: AppState
) -> PolicyUpdate:
    """Weights from a directory below one of the service's `policy_roots`.

    All is checked before anything changes. The answer comes when the new weights score.
    """
    return await state.engine.load_checkpoint(body)


@stream_router.put(
    "/policy/weights",
    operation_id="uploadWeights",
    summary="Send new weights",
    responses=CHANGE_PROBLEMS,
    openapi_extra=_SAFETENSORS,
)
async def upload(
    request: Request,
    state: AppState,
    version: Version,
    partial: Annotated[bool, Query(description="Some tensors only; the others stay as they are.")] = False,
) -> PolicyUpdate:
    """Weights as one safetensors file, under the names of `model.state_dict()`.

    They are checked as they come, in bounded memory. If the connection breaks, nothing has changed.
    """
    return await state.engine.load_upload(received(request), version, is_partial=partial)


@router.post(
    "/policy/transfer",
    operation_id="transferWeights",
    summary="Receive weights that a trainer broadcasts",
    responses=CHANGE_PROBLEMS,
)
async def transfer(
    body: Annotated[TransferRequest, Body(openapi_examples=examples.TRANSFER_REQUESTS)], state: AppState
) -> PolicyUpdate:
    """Joins the trainer's torch.distributed group of two, and takes the tensors that it broadcasts."""
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
    """An adapter as PEFT saves it, below one of the service's `policy_roots`.

    Under a known name it is a further version of it, and the last `adapter_versions` stay loaded.
    """
    return await state.engine.load_adapter(body)


@stream_router.put(
    "/policy/adapters/{name}",
    operation_id="uploadAdapter",
    summary="Send a LoRA adapter",
    responses=CHANGE_PROBLEMS,
    openapi_extra=_SAFETENSORS,
)
async def upload_adapter(
    name: Name,
    request: Request,
    state: AppState,
    version: Annotated[VersionName | None, Query(description="Default: its number.")] = None,
    default: Annotated[
        bool, Query(description="From now on it scores the requests that name no adapter.")
    ] = False,
) -> AdapterUpdate:
    """PEFT's `adapter_model.safetensors`, with the text of its config as `adapter_config` in the metadata."""
    wanted = AdapterRequest(name=name, path="-", version=version, default=default)
    return await state.engine.load_uploaded_adapter(received(request), wanted)


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
    """Requests that name it get 422 from then on; those without a name are scored without it."""
    await state.engine.unload_adapter(name, version)
    return state.policy_state


async def received(request: Request) -> AsyncIterator[bytes]:
    """A request's body, piece by piece.

    Raises:
        ClientDisconnectedError: the client died in the middle.
    """
    try:
        async for block in request.stream():
            yield block
    except ClientDisconnect:
        raise ClientDisconnectedError from None
