"""What a split policy measures and answers, and what it refuses."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from shopr1_client import Client
from shopr1_client.errors import InvalidRequestError
from shopr1_client.wire import ScoreRequest
from shopr1_rewards.recipe import Divergence, Vocabulary
from shopr1_service.engine import TokenGroup
from shopr1_service.errors import PolicyError
from shopr1_service.loaded_policy import LoadedPolicy
from shopr1_service.loading import load_policy
from shopr1_service.tensor_parallel.policy import SplitPolicy
from tests.service.http import WAIT_S, answer, group, problem, served
from tests.service.models import FAMILIES, Reference, model_of, one_thread, policy_of, random_ids, rules
from tests.service.tensor_parallel.split import (
    TOLERANCE,
    group_of,
    on_cpus,
    save,
    settings_of,
    split_policy,
    values,
)

pytestmark = on_cpus


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# Plain attention; a mask, a softcap, and a head that is the embedding, too; experts.
@pytest.fixture(params=["llama", "gemma2", "qwen3_moe"], scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(family: str) -> LoadedPolicy:
    return policy_of(model_of(family))


@pytest.fixture(scope="module")
def split(family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SplitPolicy]:
    with split_policy(save(tmp_path_factory.mktemp("policies") / "tiny", family)) as policy:
        yield policy


# --- numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", list(Divergence))
@pytest.mark.parametrize("vocabulary", list(Vocabulary))
def test_numbers_are_those_of_the_whole_policy(
    split: SplitPolicy, whole: LoadedPolicy, divergence: Divergence, vocabulary: Vocabulary
) -> None:
    how = rules(divergence=divergence, vocabulary=vocabulary, temperature=0.7)
    first = group_of(seed=1)
    longer = TokenGroup([*first.prompt_ids, *random_ids(80, seed=50)], group_of(seed=51).completions)
    # The second time the prompts are known, and the longer one begins with another.
    for groups in ([first], [first, group_of(seed=20, num_prompt=5), longer], [longer, first]):
        expected = values(whole.certainties(groups, how))
        assert values(split.certainties(groups, how)) == pytest.approx(expected, rel=0, abs=TOLERANCE)


def test_numbers_are_those_of_the_definition(split: SplitPolicy, family: str) -> None:
    reference, measured = Reference(model_of(family)), group_of(seed=3)
    expected = [
        value
        for each in measured.completions
        for value in reference.values(measured.prompt_ids, each.ids, each.measured, rules())
    ]
    assert values(split.certainties([measured], rules())) == pytest.approx(expected, rel=0, abs=1e-4)


def test_what_it_is(split: SplitPolicy, family: str) -> None:
    info = split.info
    assert (info.device, info.head, info.forward) == (
        "cpu × 2",
        FAMILIES[family].head,
        FAMILIES[family].forward,
    )


def test_prompts_are_kept_and_each_device_keeps_those_of_its_heads(
    split: SplitPolicy, whole: LoadedPolicy
) -> None:
    gained = []
    for policy in (split, whole):
        hits, num_bytes = policy.stats.cache.num_hit_tokens, policy.stats.cache.num_bytes
        for _ in range(2):
            policy.certainties([group_of(seed=200)], rules())
        stats = policy.stats.cache
        gained.append((stats.num_hit_tokens - hits, stats.num_bytes - num_bytes))
    [(split_hits, split_bytes), (whole_hits, whole_bytes)] = gained
    assert split_hits == whole_hits
    assert split_bytes * 2 == whole_bytes


# --- behind a socket --------------------------------------------------------------------------------


def test_rewards_are_those_of_the_whole_policy(split: SplitPolicy, whole: LoadedPolicy) -> None:
    completions = [answer(rationale=text) for text in ("I want tea.", "便宜", "The price is lower.")]
    body = {"groups": [group(*completions, prompt=f"page {i}") for i in range(3)]}
    rewards = []
    for policy in (split, whole):
        with served(policy) as url, Client(url, timeout_s=WAIT_S) as client:
            answered = client.score(ScoreRequest.model_validate(body))
        rewards.append([each.reward for scored in answered.groups for each in scored.rewards])
    assert rewards[0] == pytest.approx(rewards[1], rel=0, abs=TOLERANCE)
    assert len(set(rewards[0])) > 1


def test_it_does_not_change(split: SplitPolicy) -> None:
    with served(split, tensor_parallel=2) as url:
        for path, body in (
            ("/policy/update", {"path": "step-1", "version": "1"}),
            ("/policy/adapters", {"name": "a", "path": "step-1", "version": "1"}),
        ):
            refused = httpx.post(f"{url}{path}", json=body, timeout=WAIT_S)
            assert "it is split over several devices" in problem(refused, 422, "invalid_request")["detail"]
        assert httpx.get(f"{url}/policy", timeout=WAIT_S).json()["current"]["version"] == "0"
    with pytest.raises(InvalidRequestError, match="does not change"):
        split.replace_weights({}, "1")


# --- what cannot be split ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gpt2", {}, "transformers has no tensor parallel plan of GPT2LMHeadModel"),
        (
            "llama",
            {"tensor_parallel": 3},
            "3 does not divide the policy's 4 attention heads",
        ),
        (
            "llama",
            {"tensor_parallel": 4},
            "4 does not divide the policy's 2 key-value heads",
        ),
        ("llama", {"device": "cpu:0"}, "device 'cpu:0' is one"),
    ],
)
def test_a_policy_that_cannot_be_split_is_refused_before_anything_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    options: dict[str, object],
    message: str,
) -> None:
    monkeypatch.setattr("shopr1_service.tensor_parallel.policy.Ranks", None)
    with pytest.raises(PolicyError, match=message):
        load_policy(settings_of(save(tmp_path, kind), **options))
