"""LLaMA-Factory, `reward_model_type: api`, with the URL of its own server behind `/dialects/llama_factory`.

A rollout is one text, with neither a label nor the end of its prompt: both come from the label store.
"""

from functools import partial
from typing import Annotated, Literal

from asgi_correlation_id import correlation_id
from fastapi import APIRouter, Body, Request
from pydantic import BaseModel, Field

from shopr1_client.wire_base import IN_PIECES, UnicodeText
from shopr1_service.dialects import examples
from shopr1_service.dialects.requests import Paths, Rollout, RolloutReader, TrainerRequest, run_name
from shopr1_service.dialects.results import PROBLEMS, TAG, Dialect, score_rollouts
from shopr1_service.http.json_body import JsonRoute
from shopr1_service.http.state import AppState, State
from shopr1_service.monitoring.logs import current_run

DIALECT = Dialect("llama_factory", timeout_s=None)
"""LLaMA-Factory waits without limit: the service's own deadline is the only one."""

router = APIRouter(prefix="/dialects/llama_factory", tags=[TAG], route_class=JsonRoute)


class ScoreEvaluation(TrainerRequest):
    """Rollouts of one mini-batch."""

    model: Annotated[UnicodeText, Field(description="Echoed.")]
    messages: Annotated[
        list[str], IN_PIECES, Field(description="Prompt and completion, special tokens written out.")
    ]


class ScoreEvaluationAnswer(BaseModel):
    """Scores in the order of the request, as LLaMA-Factory's own server answers."""

    id: str
    object: Literal["score.evaluation"]
    model: str
    scores: list[float]


@router.post(
    "/v1/score/evaluation",
    operation_id="llamaFactoryScoreEvaluation",
    summary="LLaMA-Factory's reward API",
    responses=PROBLEMS,
)
async def score_evaluation(
    body: Annotated[ScoreEvaluation, Body(openapi_examples=examples.LLAMA_FACTORY)],
    request: Request,
    state: AppState,
) -> ScoreEvaluationAnswer:
    """Rewards of rollouts, for `reward_model_type: api`.

    The prompt is the longest one of the run (`PUT /labels`) that a text begins with; the rest is the
    completion. A rollout that cannot be scored makes the whole answer a problem, `unscorable`, unless the
    service's `llama_factory_unscorable` names a number for it.
    """
    unscorable = state.settings.llama_factory_unscorable
    results = await score_rollouts(partial(_rollouts, body, state), DIALECT, unscorable, request, state)
    return ScoreEvaluationAnswer(
        id=f"scoreval-{correlation_id.get()}",
        object="score.evaluation",
        model=body.model,
        scores=[result.reward for result in results],
    )


def _rollouts(body: ScoreEvaluation, state: State) -> list[Rollout]:
    reader = RolloutReader(state)
    run = current_run.get()
    for i, text in enumerate(body.messages):
        path = f"messages[{i}]"
        found = state.labels.split(run, text)
        if found is None:
            reader.add_error(path, f"begins with no prompt that {run_name(run)} has registered (PUT /labels)")
        else:
            reader.rollouts.append(Rollout(*found, Paths(path, path, path)))
    return reader.finish()
