"""`deterministic = true`: the same request, the same bits, whatever else was and is going on."""

import asyncio
from typing import Any

import pytest
import torch

from shopr1_client.wire import ScoreRequest
from shopr1_service.core import Origin
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.scoring.recipe_book import RecipeBook
from shopr1_service.scoring.scorer import Scorer
from shopr1_service.settings import Settings
from tests.support.http import answer, group
from tests.support.models import policy_of, tiny_model

PAGE = "<a name='home.sale'>Sale</a> " * 8


def request_of(*groups: Any) -> ScoreRequest:
    return ScoreRequest.model_validate({"groups": groups, "include": ["tokens"]})


def rationale_of(number: int) -> str:
    return answer(rationale=f"I look for number {number}, " + "and for more, " * number)


OURS = request_of(group(*(rationale_of(i) for i in range(4)), prompt=f"{PAGE}What next?"))
OTHERS = [
    request_of(group(rationale_of(5), prompt=f"{PAGE}What next?")),  # the same prompt
    request_of(group(rationale_of(6), rationale_of(1), prompt=f"{PAGE}What next? And then?")),  # continues it
    request_of(*(group(rationale_of(i), prompt=f"{PAGE[:40]}{i}") for i in range(3))),  # short ones
]


def score(*, is_deterministic: bool, dtype: torch.dtype) -> tuple[list[str], int]:
    """Our request four times, and how many tokens came from the cache."""
    settings: dict[str, Any] = {"deterministic": is_deterministic}
    policy = policy_of(tiny_model(dtype=dtype, hidden_size=64), max_sequence_tokens=4096, **settings)

    async def run() -> list[str]:
        engine = LocalEngine(policy, Settings(**settings), Metrics())
        scorer = Scorer(engine, RecipeBook("shop_r1"), Settings(), Metrics())
        try:
            first = await scorer.score(OURS, Origin("id"))
            for other in OTHERS:
                await scorer.score(other, Origin("id"))
            later = await scorer.score(OURS, Origin("id"))
            # All at once, ours in the middle: queued groups may not be joined to it.
            requests = [OTHERS[0], OTHERS[1], OURS, OTHERS[2], OURS]
            crowded = await asyncio.gather(*(scorer.score(each, Origin("id")) for each in requests))
        finally:
            scorer.close()
        return [scored.model_dump_json() for scored in (first, later, crowded[2], crowded[4])]

    return asyncio.run(run()), policy.stats.cache.num_hit_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_request_gives_the_same_bits(dtype: torch.dtype) -> None:
    (first, *others), num_hit_tokens = score(is_deterministic=True, dtype=dtype)
    assert others == [first] * 3
    assert '"self_certainty_nats":null' not in first
    assert num_hit_tokens == 0


def test_otherwise_the_prefix_cache_changes_the_last_bits() -> None:
    # So the test above is no matter of course.
    (first, *others), num_hit_tokens = score(is_deterministic=False, dtype=torch.bfloat16)
    assert num_hit_tokens > 0
    assert any(other != first for other in others)
