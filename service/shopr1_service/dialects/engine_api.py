"""Weight and adapter updates by SGLang's and vLLM's routes, which trainers know already.

    SGLang 0.5   POST /update_weights_from_disk   POST /load_lora_adapter      POST /unload_lora_adapter
                 GET  /model_info                 POST /pause_generation       POST /continue_generation
                 GET and POST /flush_cache
    vLLM 0.33    POST /v1/load_lora_adapter       POST /v1/unload_lora_adapter

Trainers pause an engine and flush its cache around an update. Here an update is atomic and clears the cache
itself: those routes exist and do nothing. Successes are answered as the engines answer them. A failure is a
problem of this service with its status, and has the members that the engines' clients read.
"""

from collections.abc import Container
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Body, Response
from fastapi.responses import PlainTextResponse
from pydantic import Field

from shopr1_client.errors import (
    InternalError,
    InvalidRequestError,
    NotFoundError,
    NotReadyError,
    ProblemError,
)
from shopr1_client.wire_base import AnswerModel
from shopr1_client.wire_policy import AdapterName, AdapterRequest, UpdateRequest, VersionName
from shopr1_service.dialects.requests import TrainerRequest
from shopr1_service.http import examples
from shopr1_service.http.json_body import JsonRoute
from shopr1_service.http.problem_responses import BODY, CHANGE_PROBLEMS, problem_responses
from shopr1_service.http.problems import extending_problems
from shopr1_service.http.state import AppState, State

TAG = "engines"
router = APIRouter(tags=[TAG], route_class=JsonRoute)

_UNLOAD_PROBLEMS = problem_responses(*BODY, NotFoundError, NotReadyError)
_FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)
_ADDED = "Success: LoRA adapter '{name}' added successfully."
_REMOVED = "Success: LoRA adapter '{name}' removed successfully."
_NO_PATH = "__tensor__"
"""SGLang's path of an adapter that was not loaded from a directory."""


def _sglang_members(problem: ProblemError) -> dict[str, Any]:
    return {"success": False, "message": problem.detail, "error_message": problem.detail}


def _vllm_members(problem: ProblemError) -> dict[str, Any]:
    location = problem.errors[0]["location"] if problem.errors else None
    kind = "BadRequestError" if problem.status < HTTPStatus.INTERNAL_SERVER_ERROR else "InternalServerError"
    kind = "NotFoundError" if problem.status == HTTPStatus.NOT_FOUND else kind
    fields = {"message": problem.detail, "type": kind, "param": location, "code": problem.status}
    return {"error": fields}


_for_sglang = extending_problems(_sglang_members)
_for_vllm = extending_problems(_vllm_members)


class UpdateFromDisk(TrainerRequest):
    """The fields of SGLang's request that have a meaning here."""

    model_path: Annotated[str, Field(min_length=1, max_length=4096)]
    weight_version: Annotated[VersionName | None, Field(description="Default: its number.")] = None


class UpdateFromDiskAnswer(AnswerModel):
    """SGLang's response."""

    success: bool
    message: str
    num_paused_requests: int


class ModelInfo(AnswerModel):
    """The fields of SGLang's response that are known here."""

    model_path: str
    weight_version: str
    is_generation: bool


class GenerationAnswer(AnswerModel):
    """SGLang's response to pausing and continuing."""

    message: str
    status: str


class LoraAnswer(AnswerModel):
    """SGLang's response to loading and unloading."""

    success: bool = True
    error_message: str = ""
    loaded_adapters: Annotated[
        dict[str, str], Field(description="Paths by name; `__tensor__` for an adapter that was uploaded.")
    ]


class LoadLora(TrainerRequest):
    """The fields of both engines' requests that have a meaning here."""

    lora_name: AdapterName
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: Annotated[
        bool, Field(description="vLLM: the name may be loaded already; then it is a further version of it.")
    ] = False


class UnloadLora(TrainerRequest):
    """The fields of both engines' requests that have a meaning here."""

    lora_name: AdapterName


@router.post(
    "/update_weights_from_disk",
    operation_id="sglangUpdateWeights",
    summary="SGLang: take the weights of a checkpoint",
    responses=CHANGE_PROBLEMS,
)
@_for_sglang
async def update_weights_from_disk(
    body: Annotated[UpdateFromDisk, Body(openapi_examples=examples.SGLANG_UPDATES)], state: AppState
) -> UpdateFromDiskAnswer:
    """`POST /policy/update` in SGLang's terms."""
    version = body.weight_version or str(state.engine.versions.num_changes + 1)
    update = await state.engine.load_checkpoint(UpdateRequest(path=body.model_path, version=version))
    message = f"version {update.current.version!r} is loaded; scoring paused for {update.pause_s:.3f} s"
    return UpdateFromDiskAnswer(success=True, message=message, num_paused_requests=0)


@router.get(
    "/model_info",
    operation_id="sglangModelInfo",
    summary="SGLang: the loaded version",
    responses=problem_responses(InternalError, NotReadyError),
)
@_for_sglang
async def model_info(state: AppState) -> ModelInfo:
    """The version that scores requests that name none."""
    info = state.engine.info
    return ModelInfo(model_path=info.model, weight_version=info.version, is_generation=False)


def _text(example: str) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for a response in plain text."""
    return {200: {"content": {"text/plain": {"example": example}}}}


# --- routes that do nothing -------------------------------------------------------------------------

_NO_OP_PROBLEMS = problem_responses(InternalError, NotReadyError)


def _add_generation_route(action: str, message: str) -> None:
    @router.post(
        f"/{action}_generation",
        operation_id=f"sglang{action.capitalize()}",
        summary=f"SGLang: {action} around an update",
        responses=_NO_OP_PROBLEMS,
    )
    @_for_sglang
    async def route(state: AppState) -> GenerationAnswer:
        """Does nothing: an update is atomic."""
        state.scorer  # noqa: B018  # raises unless the policy is loaded
        return GenerationAnswer(message=message, status="ok")


_add_generation_route("pause", "Generation paused successfully.")
_add_generation_route("continue", "Generation continued successfully.")


def _add_flush_route(method: str, name: str) -> None:
    @router.api_route(
        "/flush_cache",
        methods=[method],
        operation_id=name,
        summary="SGLang: flush the cache",
        response_class=PlainTextResponse,
        responses=_text(_FLUSHED) | _NO_OP_PROBLEMS,
    )
    @_for_sglang
    async def route(state: AppState) -> Response:
        """Does nothing: an update clears the cache itself."""
        state.scorer  # noqa: B018  # raises unless the policy is loaded
        return PlainTextResponse(_FLUSHED)


_add_flush_route("POST", "sglangFlushCache")
_add_flush_route("GET", "sglangFlushCacheByGet")


# --- adapters ---------------------------------------------------------------------------------------


@router.post(
    "/v1/load_lora_adapter",
    operation_id="vllmLoadLora",
    summary="vLLM: load a LoRA adapter",
    response_class=PlainTextResponse,
    responses=_text(_ADDED.format(name="grpo-v7")) | CHANGE_PROBLEMS,
)
@_for_vllm
async def vllm_load(
    body: Annotated[LoadLora, Body(openapi_examples=examples.LORA_LOADS)], state: AppState
) -> Response:
    """`POST /policy/adapters` in vLLM's terms; requests choose the adapter by its name."""
    await _load(body, state)
    return PlainTextResponse(_ADDED.format(name=body.lora_name))


@router.post(
    "/v1/unload_lora_adapter",
    operation_id="vllmUnloadLora",
    summary="vLLM: unload a LoRA adapter",
    response_class=PlainTextResponse,
    responses=_text(_REMOVED.format(name="grpo-v6")) | _UNLOAD_PROBLEMS,
)
@_for_vllm
async def vllm_unload(
    body: Annotated[UnloadLora, Body(openapi_examples=examples.LORA_UNLOADS)], state: AppState
) -> Response:
    """`DELETE /policy/adapters/{name}` in vLLM's terms."""
    await state.engine.unload_adapter(body.lora_name)
    return PlainTextResponse(_REMOVED.format(name=body.lora_name))


@router.post(
    "/load_lora_adapter",
    operation_id="sglangLoadLora",
    summary="SGLang: load a LoRA adapter",
    responses=CHANGE_PROBLEMS,
)
@_for_sglang
async def sglang_load(
    body: Annotated[LoadLora, Body(openapi_examples=examples.LORA_LOADS)], state: AppState
) -> LoraAnswer:
    """`POST /policy/adapters` in SGLang's terms; requests choose the adapter by its name."""
    await _load(body, state)
    return _loaded(state)


@router.post(
    "/unload_lora_adapter",
    operation_id="sglangUnloadLora",
    summary="SGLang: unload a LoRA adapter",
    responses=_UNLOAD_PROBLEMS,
)
@_for_sglang
async def sglang_unload(
    body: Annotated[UnloadLora, Body(openapi_examples=examples.LORA_UNLOADS)], state: AppState
) -> LoraAnswer:
    """`DELETE /policy/adapters/{name}` in SGLang's terms."""
    await state.engine.unload_adapter(body.lora_name)
    return _loaded(state)


async def _load(body: LoadLora, state: State) -> None:
    _refuse_if_loaded(body, state.engine.versions.adapters)
    await state.engine.load_adapter(AdapterRequest(name=body.lora_name, path=body.lora_path))
    state.adapter_paths[body.lora_name] = body.lora_path


def _loaded(state: State) -> LoraAnswer:
    """The loaded adapters. Other processes on Ray, and uploads, leave no path here."""
    paths = {name: state.adapter_paths.get(name, _NO_PATH) for name in state.engine.versions.adapters}
    state.adapter_paths = paths
    return LoraAnswer(loaded_adapters=paths)


def _refuse_if_loaded(body: LoadLora, adapters: Container[str]) -> None:
    """Raise as both engines do: a client must not mistake the old weights for the new ones."""
    if body.lora_name in adapters and not body.load_inplace:
        message = f"an adapter {body.lora_name!r} is loaded already; unload it, or set load_inplace"
        raise InvalidRequestError(message, errors=[{"location": "lora_name", "message": message}])
