"""SkyRL 0.3: its data set, its registry and its generator, on a CPU. Completions are prescribed.

Not tested, because it needs a GPU: vLLM as the engine, and the training step.
"""

import asyncio
import importlib
import json
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import skyrl_gym
import typing_extensions
from skyrl_gym.envs import deregister, register
from transformers import AutoTokenizer

from shopr1_client.base import BaseClient
from shopr1_client.errors import TransportError, UnscorableError
from shopr1_client.trainers.service import Service
from tests.integration.trainers.live import LOG_KEYS, ROUNDING, TOO_LONG, Live, Rollout, free_port, rollouts
from tests.integration.trainers.tokenizer import save_tokenizer

BATCHED = pytest.mark.parametrize("batched", [False, True], ids=["agent_loop", "batched"])


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("policy")))


@pytest.fixture(scope="session")
def skyrl() -> Any:
    """SkyRL's modules. Before Python 3.12 pydantic rejects the TypedDict that they use."""
    names = ("train.config", "train.dataset.dataset", "train.generators.skyrl_gym_generator")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typing, "TypedDict", typing_extensions.TypedDict)
        for name in names:
            importlib.import_module(f"skyrl.{name}")
    return importlib.import_module("skyrl")


@pytest.fixture(scope="session", autouse=True)
def registered() -> Iterator[None]:
    register(id="shop_r1", entry_point="shopr1_client.trainers.skyrl:ShopR1Env")
    yield
    deregister("shop_r1")


class Engine:
    """Returns recorded completions. The session id is the index of the rollout."""

    def __init__(self, tokenizer: Any, own: Sequence[Rollout]) -> None:
        self._tokenizer = tokenizer
        self._completions = [rollout.completion for rollout in own]

    async def generate(self, engine_input: Any, model: str | None = None) -> dict[str, Any]:
        sessions = engine_input.get("session_ids")  # none for a whole batch
        indices = range(len(self._completions)) if sessions is None else [int(sessions[0].split("_")[0])]
        responses = [self._completions[i] for i in indices]
        ids = [self._tokenizer.encode(text, add_special_tokens=False) for text in responses]
        return {
            "responses": responses,
            "response_ids": [[*own, self._tokenizer.eos_token_id] for own in ids],
            "stop_reasons": ["stop"] * len(responses),
        }

    async def finish_session(self, session_id: str) -> None:
        pass


@BATCHED
@pytest.mark.usefixtures("environment")
def test_rewards_equal_those_of_the_service(batched: bool, skyrl: Any, tokenizer: Any, live: Live) -> None:
    own = rollouts()
    generated = _generate(skyrl, tokenizer, own, batched)
    truths = live.rewards(own)
    totals = [_total(reward) for reward in generated["rewards"]]
    assert totals == _approx(truths)
    assert len(set(truths)) > 5
    if not batched:  # per-token rewards: only the last one is not 0
        assert [reward[-1] for reward in generated["rewards"]] == totals


@BATCHED
@pytest.mark.usefixtures("environment")
def test_terms_are_logged(batched: bool, skyrl: Any, tokenizer: Any, live: Live) -> None:
    own = rollouts()
    metrics = _generate(skyrl, tokenizer, own, batched)["rollout_metrics"]
    logged = {key.removeprefix("environment/"): metrics[key] for key in metrics if "shopr1" in key}
    assert list(logged) == list(LOG_KEYS)
    components = [truth["components"] for truth in live.score(own)]
    for name in components[0]:
        assert logged[f"shopr1/{name}"] == _approx(fmean(c[name] or 0.0 for c in components))


@pytest.mark.usefixtures("environment")
def test_rows_of_a_data_set(skyrl: Any, tokenizer: Any, live: Live, tmp_path: Path) -> None:
    """In a column of objects each row has the keys of all rows, with None for missing ones."""
    own = rollouts()
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([_row(rollout) for rollout in own]), path)
    rows = skyrl.train.dataset.dataset.PromptDataset(
        str(path), tokenizer, max_prompt_length=4096, num_workers=1
    )
    extras = [rows[i][2] for i in range(len(rows))]
    assert any(None in extra["reward_spec"]["ground_truth"].values() for extra in extras)
    generated = _generate(skyrl, tokenizer, own, batched=True, extras=extras)
    assert generated["rewards"] == _approx(live.rewards(own))


@pytest.mark.usefixtures("environment")
def test_environment_without_a_generator(live: Live) -> None:
    [rollout] = rollouts()[:1]
    environment = skyrl_gym.make("shop_r1", extras={"reward_spec": {"ground_truth": rollout.ground_truth}})
    assert environment.init(rollout.prompt) == (rollout.prompt, {})
    assert environment.get_metrics() == {}  # no response: no numbers to average
    output = environment.step(rollout.completion)
    assert output["reward"] == _approx(live.rewards([rollout])[0])
    assert (output["done"], output["observations"]) == (True, [])
    assert list(environment.get_metrics()) == list(LOG_KEYS)


@pytest.mark.parametrize("config", [{"chat_template_kwargs": {"x": 1, "y": 1}}, {}, None])
def test_arguments_of_the_chat_template(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SkyRL does not show its own: they are repeated for the environment, or in a column."""
    sent: list[Any] = []

    def stop(_service: Service, own: Sequence[Any]) -> Any:
        sent.extend(own)
        raise InterruptedError

    monkeypatch.setattr(Service, "score_sync", stop)
    extras = {"reward_spec": {"ground_truth": "{}"}, "chat_template_kwargs": {"y": 2, "z": None}}
    environment = skyrl_gym.make("shop_r1", env_config=config, extras=extras)
    environment.init([{"role": "user", "content": "page"}])
    with pytest.raises(InterruptedError):
        environment.step("x")
    expected = {
        "chat_template_kwargs": {**({"x": 1} if config else {}), "y": 2},
        "continue_final_message": False,
    }
    assert [own.options.given() for own in sent] == [expected]


@BATCHED
@pytest.mark.usefixtures("environment")
def test_unscorable_rollout(batched: bool, skyrl: Any, tokenizer: Any) -> None:
    """The whole batch fails."""
    with pytest.raises(UnscorableError, match="sequence_too_long"):
        _generate(skyrl, tokenizer, _with_one_too_long(), batched)


@BATCHED
@pytest.mark.usefixtures("environment")
def test_configured_reward_of_an_unscorable_rollout(
    batched: bool, skyrl: Any, tokenizer: Any, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOPR1_CLIENT_UNSCORABLE", "-1.5")
    own = _with_one_too_long()
    good, _, also_good = live.rewards(own)
    generated = _generate(skyrl, tokenizer, own, batched)
    assert [_total(reward) for reward in generated["rewards"]] == _approx([good, -1.5, also_good])
    assert generated["rollout_metrics"]["environment/shopr1/unscorable"] == 1 / 3


@BATCHED
def test_no_service(batched: bool, skyrl: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = BaseClient.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "retry_for_s", 0.0)  # instead of ten minutes
    monkeypatch.setenv("SHOPR1_CLIENT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TransportError):
        _generate(skyrl, tokenizer, rollouts()[:2], batched)


def _generate(
    skyrl: Any,
    tokenizer: Any,
    own: Sequence[Rollout],
    batched: bool,
    extras: Sequence[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The result of a batch for SkyRL's trainer."""
    generator = skyrl.train.generators.skyrl_gym_generator.SkyRLGymGenerator(
        skyrl.train.config.GeneratorConfig(batched=batched, max_input_length=100_000),
        skyrl.train.config.SkyRLGymConfig(),
        Engine(tokenizer, own),
        tokenizer,
    )
    batch = {
        "prompts": [rollout.prompt for rollout in own],
        "env_classes": ["shop_r1"] * len(own),
        "trajectory_ids": [
            skyrl.train.generators.base.TrajectoryID(instance_id=str(i), repetition_id=0)
            for i in range(len(own))
        ],
        "env_extras": extras or [{"reward_spec": {"ground_truth": rollout.ground_truth}} for rollout in own],
    }
    generated: dict[str, Any] = asyncio.run(generator.generate(batch, disable_tqdm=True))
    return generated


def _row(rollout: Rollout) -> dict[str, Any]:
    truth: Any = rollout.ground_truth  # some are JSON in a string
    return {
        "prompt": rollout.prompt,
        "env_class": "shop_r1",
        "reward_spec": {"ground_truth": json.loads(truth) if isinstance(truth, str) else truth},
    }


def _total(reward: float | list[float]) -> float:
    return sum(reward) if isinstance(reward, list) else reward


def _approx(expected: Any) -> Any:
    return pytest.approx(expected, rel=0.0, abs=ROUNDING)


def _with_one_too_long() -> list[Rollout]:
    first, second, third = rollouts()[:3]
    return [first, Rollout(TOO_LONG, second.completion, second.ground_truth), third]
