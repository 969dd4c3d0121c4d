"""Weight and adapter updates by SGLang's and vLLM's routes, which trainers know already.

    SGLang 0.5   POST /update_weights_from_disk   POST /load_lora_adapter      POST /unload_lora_adapter
                 GET  /model_info                 POST /pause_generation       POST /continue_generation
                 GET and POST /flush_cache
    vLLM 0.33    POST /v1/load_lora_adapter       POST /v1/unload_lora_adapter

Trainers pause an engine and flush its cache around an update. Here an update is atomic and clears the cache
itself: those routes exist and do nothing. A failure is a problem of this service, with its status.
"""

from collections.abc import Container
from typing import Annotated, Any

from fastapi import APIRouter, Body, Response
from fastapi.responses import PlainTextResponse
from pydantic import Field

from shopr1_client.errors import InternalError, InvalidRequestError, NotFoundError, NotReadyError
from shopr1_client.wire_base import AnswerModel
from shopr1_client.wire_policy import AdapterName, AdapterRequest, UpdateRequest, VersionName
from shopr1_service.dialects.requests import TrainerRequest
from shopr1_service.http import examples
from shopr1_service.http.problem_responses import BODY, CHANGE_PROBLEMS, problem_responses
from shopr1_service.http.state import AppState

TAG = "engines"
router = APIRouter(tags=[TAG])

_UNLOAD_PROBLEMS = problem_responses(*BODY, NotFoundError, NotReadyError)
_NOTHING_TO_DO = "Nothing to do: updates are atomic.\n"
_LOADED = "Success: LoRA adapter '{name}' is loaded."
_UNLOADED = "Success: LoRA adapter '{name}' is unloaded."


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
async def model_info(state: AppState) -> ModelInfo:
    """The version that scores requests that name none."""
    info = state.engine.info
    return ModelInfo(model_path=info.model, weight_version=info.version, is_generation=False)


def _text(example: str) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for a response in plain text."""
    return {200: {"content": {"text/plain": {"example": example}}}}


def _add_no_op(path: str, method: str, name: str, summary: str) -> None:
    @router.api_route(
        path,
        methods=[method],
        operation_id=name,
        summary=f"SGLang: {summary}",
        response_class=PlainTextResponse,
        responses=_text(_NOTHING_TO_DO) | problem_responses(InternalError, NotReadyError),
    )
    async def route(state: AppState) -> Response:
        """Does nothing: an update is atomic, and clears the cache itself."""
        state.scorer  # noqa: B018  # raises unless the policy is loaded
        return PlainTextResponse(_NOTHING_TO_DO)


_add_no_op("/pause_generation", "POST", "sglangPause", "pause for an update")
_add_no_op("/continue_generation", "POST", "sglangContinue", "continue after an update")
_add_no_op("/flush_cache", "POST", "sglangFlushCache", "flush the cache")
_add_no_op("/flush_cache", "GET", "sglangFlushCacheByGet", "flush the cache")


def _add_lora_routes(prefix: str, engine: str) -> None:
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
        """`POST /policy/adapters` in the engine's terms; requests choose the adapter by its name."""
        _refuse_if_loaded(body, state.engine.versions.adapters)
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
        """`DELETE /policy/adapters/{name}` in the engine's terms."""
        await state.engine.unload_adapter(body.lora_name)
        return PlainTextResponse(_UNLOADED.format(name=body.lora_name))


_add_lora_routes("/v1", "vLLM")
_add_lora_routes("", "SGLang")


def _refuse_if_loaded(body: LoadLora, adapters: Container[str]) -> None:
    """Raise as both engines do: a client must not mistake the old weights for the new ones."""
    if body.lora_name in adapters and not body.load_inplace:
        message = f"an adapter {body.lora_name!r} is loaded already; unload it, or set load_inplace"
        raise InvalidRequestError(message, errors=[{"location": "lora_name", "message": message}])
