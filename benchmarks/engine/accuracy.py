"""Error of a 16-bit policy's self-certainty against the same policy in float32."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.engine.baselines import batch_certainties
from benchmarks.report import Report
from benchmarks.subject import RECIPE, Subject, load_embedded
from shopr1_client.wire import Group, ScoreRequest
from shopr1_service.core import Certainty, PromptKey, TokenGroup
from shopr1_service.scoring.prepare import prepare
from shopr1_service.settings import DType

SESSIONS = Path(__file__).parents[2] / "examples" / "sessions.jsonl"
NATS_PER_TOKEN = "nats per token"


def accuracy(subject: Subject, report: Report) -> None:
    """Mean absolute error of the engine, and of a plain forward with all logits reduced in fp32."""
    if subject.model.dtype == torch.float32:
        return
    groups = session_groups(subject)
    _, exact_model = load_embedded(subject.settings.model_copy(update={"dtype": DType.FLOAT32}))
    exact_T = by_forward(exact_model, groups)
    engine_error = mean_absolute_error(by_engine(subject, groups), exact_T)
    full_error = mean_absolute_error(by_forward(subject.model, groups), exact_T)
    workload = f"sessions, {len(exact_T)} tokens"
    report.add(workload, "error of engine", engine_error, NATS_PER_TOKEN)
    report.add(workload, "error of full", full_error, NATS_PER_TOKEN)
    report.add(workload, "error of engine / of full", engine_error / full_error, "x")


def session_groups(subject: Subject) -> list[TokenGroup]:
    """The example sessions as token groups, prepared as the service prepares them."""
    lines = SESSIONS.read_text("utf-8").splitlines()
    request = ScoreRequest(groups=[Group.model_validate_json(line) for line in lines])
    prepared = prepare(request, RECIPE, subject.policy.codec, subject.settings.limits, wants_ids=False)
    return [group.token_group() for group in prepared]


def by_engine(subject: Subject, groups: Sequence[TokenGroup]) -> Tensor:
    """Self-certainty of every measured token by the engine, fp64."""
    measured = subject.policy.certainties(groups, RECIPE.self_certainty)
    return torch.tensor([value for group in measured for one in group for value in _values(one)]).double()


def _values(measurement: object) -> tuple[float, ...]:
    assert isinstance(measurement, Certainty), measurement
    return measurement.values


def by_forward(model: PreTrainedModel, groups: Sequence[TokenGroup]) -> Tensor:
    """Self-certainty of every measured token by a plain forward, fp64."""
    values = [batch_certainties(model, single, keeps_all=True)[0] for single in _single_rollouts(groups)]
    return torch.cat(values).double().cpu()


def _single_rollouts(groups: Sequence[TokenGroup]) -> Iterator[TokenGroup]:
    """One group per completion, because completions of one prompt differ in length."""
    for group in groups:
        for completion in group.completions:
            yield TokenGroup(PromptKey(group.prompt_ids), [completion])


def mean_absolute_error(values_T: Tensor, exact_T: Tensor) -> float:
    return float((values_T - exact_T).abs().mean())
