"""Commands, code and links of the README are valid."""

import json
import re
from pathlib import Path

from shopr1_client.wire import ScoreRequest, ScoreResponse
from shopr1_rewards import load_recipe, total

README = Path(__file__).parents[2] / "README.md"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


def test_the_curl_example_is_a_valid_request() -> None:
    console = next(block for block in _blocks("console") if "curl" in block)
    body = re.search(r"-d '(.*)'", console, re.DOTALL)
    assert body is not None
    request = ScoreRequest.model_validate_json(body.group(1))
    assert len(request.groups[0].completions) == 1


def test_the_printed_response_is_valid_with_the_shipped_recipe() -> None:
    answer = ScoreResponse.model_validate(json.loads(_blocks("json")[0]))
    reward = answer.groups[0].rewards[0]
    assert answer.recipe.digest == load_recipe("shop_r1").digest
    assert reward.reward == total(reward.components)
    assert reward.details.self_certainty_nats is not None
    alpha = load_recipe("shop_r1").self_certainty.alpha
    assert reward.components["self_certainty"] == alpha * reward.details.self_certainty_nats


def test_make_targets_exist() -> None:
    text = README.read_text("utf-8")
    makefile = (README.parent / "Makefile").read_text("utf-8")
    named = set(re.findall(r"`?make ([a-z-]+)", text))
    assert named >= {"demo", "test"}
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text("utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
