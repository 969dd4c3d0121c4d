"""SkyRL: an environment of one turn, whose reward the service gives.

    from skyrl_gym.envs import register
    register(id="shop_r1", entry_point="shopr1_client.trainers.skyrl:ShopR1Env")

Each row of the data set has `env_class: shop_r1` and `reward_spec: {"ground_truth": …}`.
"""

from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

from shopr1_client.logs import log_values
from shopr1_client.rollouts import Rollout
from shopr1_client.trainers.service import Service, chat
from shopr1_client.wire import Message


class ShopR1Env(BaseTextEnv):  # type: ignore[misc]  # checked where there is no SkyRL
    """One answer, one reward."""

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:  # noqa: ANN401
        super().__init__()
        self._truth = (extras or {})["reward_spec"]["ground_truth"]
        self._prompt: list[Message] = []
        self._logs: dict[str, float] = {}

    def init(self, prompt: list[dict[str, str]]) -> tuple[list[dict[str, str]], dict[str, Any]]:
        self._prompt = chat(prompt)
        return prompt, {}

    def step(self, action: str) -> BaseTextEnvStepOutput:
        """Ends the episode.

        Raises:
            UnscorableError: the answer cannot be scored, and no number may stand for its reward.
        """
        service = Service.find()
        rewards = service.score_sync(
            [Rollout(prompt=self._prompt, completion=action, ground_truth=self._truth)]
        )
        self._logs = log_values(rewards[0])
        return BaseTextEnvStepOutput(
            observations=[], reward=service.numbers(rewards)[0], done=True, metadata=self._logs
        )

    def get_metrics(self) -> dict[str, Any]:
        return self._logs
