"""SkyRL: a single-turn environment with rewards from the service.

    from skyrl_gym.envs import register
    register(id="shop_r1", entry_point="shopr1_client.trainers.skyrl:ShopR1Env")

Each row of the data set has `env_class: shop_r1` and `reward_spec: {"ground_truth": …}`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

from shopr1_client.grouping import Rollout
from shopr1_client.reward_logs import log_values
from shopr1_client.trainers.service import Service, chat
from shopr1_client.wire import Message, Text


class ShopR1Env(BaseTextEnv):  # type: ignore[misc]  # checked where there is no SkyRL
    """Environment with one answer and one reward."""

    def __init__(self, env_config: Any = None, extras: Mapping[str, Any] | None = None) -> None:  # noqa: ANN401
        super().__init__()
        self._truth = (extras or {})["reward_spec"]["ground_truth"]
        self._prompt: list[Message] = []
        self._logs: dict[str, float] = {}

    def init(self, prompt: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Mapping[str, Any]], dict[str, Any]]:
        self._prompt = chat(prompt)
        return prompt, {}

    def step(self, action: str) -> BaseTextEnvStepOutput:
        """Score the answer and end the episode.

        Raises:
            UnscorableError: the answer cannot be scored, and no number is configured for it.
        """
        service = Service.find()
        rollout = Rollout(prompt=self._prompt, completion=Text(text=action), ground_truth=self._truth)
        rewards = service.score_sync([rollout])
        self._logs = log_values(rewards[0])
        return BaseTextEnvStepOutput(
            observations=[], reward=service.numbers(rewards)[0], done=True, metadata=self._logs
        )

    def get_metrics(self) -> dict[str, Any]:
        """Values that SkyRL averages and logs under `environment/`."""
        return self._logs
