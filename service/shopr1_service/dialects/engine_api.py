"""Weights and adapters in the words of SGLang and vLLM, whose routes trainers know already.

    SGLang 0.5   POST /update_weights_from_disk   POST /load_lora_adapter      POST /unload_lora_adapter
                 GET  /model_info                 POST /pause_generation       POST /continue_generation
                 GET and POST /flush_cache
    vLLM 0.33    POST /v1/load_lora_adapter       POST /v1/unload_lora_adapter

Trainers pause an engine and flush its cache around an update. Here an update is atomic and renews the cache
by itself: those routes are there, and do nothing. What fails is a problem of this service, with its status.
"""

from collections.abc import Container
from typing import Annotated, Any

from fastapi import APIRouter, Body, Response
from fastapi.responses import PlainTextResponse
from pydantic import Field

from shopr1_client.errors import (
    InternalError,
    InvalidRequestError,
    MalformedBodyError,
    NotFoundError,
    NotReadyError,
    RequestTimeoutError,
    TooLargeError,
)
from shopr1_client.wire_base import AnswerModel
from shopr1_client.wire_policy import AdapterName, AdapterRequest, UpdateRequest, VersionName
from shopr1_service.dialects.requests import TrainerRequest
from shopr1_service.dialects.results import AppState
from shopr1_service.http import examples
from shopr1_service.http.problem_responses import CHANGE_PROBLEMS, problem_responses
from shopr1_service.http.responses import json_answer

TAG = "engines"
router = APIRouter(tags=[TAG])

_UNLOAD_PROBLEMS = problem_responses(
    MalformedBodyError,
    NotFoundError,
    RequestTimeoutError,
    TooLargeError,
    InvalidRequestError,
    InternalError,
    NotReadyError,
)

_NOTHING_TO_DO = "Nothing to do: updates are atomic.\n"
_LOADED = "Success: LoRA adapter '{name}' is loaded."
_UNLOADED = "Success: LoRA adapter '{name}' is unloaded."


class UpdateFromDisk(TrainerRequest):
    """What of SGLang's request means something here."""

    model_path: Annotated[str, Field(min_length=1, max_length=4096)]
    weight_version: Annotated[VersionName | None, Field(description="Default: its number.")] = None


class UpdateFromDiskAnswer(AnswerModel):
    """As SGLang answers."""

    success: bool
    message: str
    num_paused_requests: int


class ModelInfo(AnswerModel):
    """What of SGLang's answer is known here."""

    model_path: str
    weight_version: str
    is_generation: bool


class LoadLora(TrainerRequest):
    """What of both engines' requests means something here."""

    lora_name: AdapterName
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: Annotated[
        bool, Field(description="vLLM: the name may be loaded already; then it is a further version of it.")
    ] = False


class UnloadLora(TrainerRequest):
    """What of both engines' requests means something here."""

    lora_name: AdapterName


@router.post(
    "/update_weights_from_disk",
    response_model=UpdateFromDiskAnswer,
    operation_id="sglangUpdateWeights",
    summary="SGLang: take the weights of a checkpoint",
    responses=CHANGE_PROBLEMS,
)
async def update_weights_from_disk(
    body: Annotated[UpdateFromDisk, Body(openapi_examples=examples.SGLANG_UPDATES)], state: AppState
) -> Response:
    """`POST /policy/update` in SGLang's words."""
    version = body.weight_version or str(state.engine.versions.num_changes + 1)
    update = await state.engine.load_checkpoint(UpdateRequest(path=body.model_path, version=version))
    message = f"version {update.current.version!r} scores since {update.pause_s:.3f} s of pause"
    return json_answer(UpdateFromDiskAnswer(success=True, message=message, num_paused_requests=0))


@router.get(
    "/model_info",
    response_model=ModelInfo,
    operation_id="sglangModelInfo",
    summary="SGLang: the loaded version",
    responses=problem_responses(InternalError, NotReadyError),
)
async def model_info(state: AppState) -> Response:
    """The version that scores requests that name none."""
    info = state.engine.info
    return json_answer(ModelInfo(model_path=info.model, weight_version=info.version, is_generation=False))


def _text(example: str) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for an answer in plain text."""
    return {200: {"content": {"text/plain": {"example": example}}}}


def _does_nothing(path: str, method: str, name: str, what: str) -> None:
    @router.api_route(
        path,
        methods=[method],
        operation_id=name,
        summary=f"SGLang: {what}",
        response_class=PlainTextResponse,
        responses=_text(_NOTHING_TO_DO) | problem_responses(InternalError, NotReadyError),
    )
    async def route(state: AppState) -> Response:
        """Does nothing: an update is atomic, and renews the cache by itself."""
        state.scorer  # noqa: B018  # there must be a policy that is running
        return PlainTextResponse(_NOTHING_TO_DO)


_does_nothing("/pause_generation", "POST", "sglangPause", "stop for an update")
_does_nothing("/continue_generation", "POST", "sglangContinue", "go on after an update")
_does_nothing("/flush_cache", "POST", "sglangFlushCache", "forget what is cached")
_does_nothing("/flush_cache", "GET", "sglangFlushCacheByGet", "forget what is cached")


def _lora_routes(prefix: str, engine: str) -> None:
    name = engine.lower()

    @router.post(
        f"{prefix}/load_lora_adapter",
        operation_id=f"{name}LoadLora",
        summary=f"{engine}: load a LoRA adapter",
        response_class=PlainTextResponse,
        responses=_text(_LOADED.format(name="grpo-v7")) | CHANGE_PROBLEMS,
    )
    async def load(
        body: Annotated[LoadLora, Body(openapi_examples=examples.LORA_LOADS)], state: AppState
    ) -> Response:
        """`POST /policy/adapters` in the engine's words; requests choose the adapter by its name."""
        _refuse_if_known(body, state.engine.versions.adapters)
        await state.engine.load_adapter(AdapterRequest(name=body.lora_name, path=body.lora_path))
        return PlainTextResponse(_LOADED.format(name=body.lora_name))

    @router.post(
        f"{prefix}/unload_lora_adapter",
        operation_id=f"{name}UnloadLora",
        summary=f"{engine}: unload a LoRA adapter",
        response_class=PlainTextResponse,
        responses=_text(_UNLOADED.format(name="grpo-v6")) | _UNLOAD_PROBLEMS,
    )
    async def unload(
        body: Annotated[UnloadLora, Body(openapi_examples=examples.LORA_UNLOADS)], state: AppState
    ) -> Response:
        """`DELETE /policy/adapters/{name}` in the engine's words."""
        await state.engine.unload_adapter(body.lora_name)
        return PlainTextResponse(_UNLOADED.format(name=body.lora_name))


_lora_routes("/v1", "vLLM")
_lora_routes("", "SGLang")


def _refuse_if_known(body: LoadLora, adapters: Container[str]) -> None:
    """Both engines do, so that nobody takes the old weights for the new ones."""
    if body.lora_name in adapters and not body.load_inplace:
        message = f"an adapter {body.lora_name!r} is loaded already; unload it, or set load_inplace"
        raise InvalidRequestError(message, errors=[{"location": "lora_name", "message": message}])
