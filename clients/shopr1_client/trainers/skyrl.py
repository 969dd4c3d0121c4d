"""SkyRL: a single-turn environment with rewards from the service.

    from skyrl_gym.envs import register
    register(id="shop_r1", entry_point="shopr1_client.trainers.skyrl:ShopR1Env")

Each row of the data set has `env_class: shop_r1` and `reward_spec: {"ground_truth": …}`. SkyRL does not show
`generator.chat_template_kwargs` to an environment: repeat them in `environment.skyrl_gym.shop_r1`, in a
column `chat_template_kwargs`, or in `SHOPR1_CLIENT_CHAT_TEMPLATE_KWARGS`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

from shopr1_client.grouping import Rollout
from shopr1_client.reward_logs import log_values
from shopr1_client.trainers.service import Service, arguments, chat
from shopr1_client.wire import Message, Text
from shopr1_client.wire_prompt import PromptOptions


class ShopR1Env(BaseTextEnv):  # type: ignore[misc]  # checked where there is no SkyRL
    """Environment with one answer and one reward."""

    def __init__(self, env_config: Any = None, extras: Mapping[str, Any] | None = None) -> None:  # noqa: ANN401
        super().__init__()
        self._truth = (extras or {})["reward_spec"]["ground_truth"]
        # SkyRL adds a generation prompt to all messages.
        self._options = PromptOptions(
            chat_template_kwargs=_template_arguments(env_config, extras) or None, continue_final_message=False
        )
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
        rollout = Rollout(
            prompt=self._prompt,
            completion=Text(text=action),
            ground_truth=self._truth,
            options=self._options,
        )
        rewards = service.score_sync([rollout])
        self._logs = log_values(rewards[0])
        return BaseTextEnvStepOutput(
            observations=[], reward=service.numbers(rewards)[0], done=True, metadata=self._logs
        )

    def get_metrics(self) -> dict[str, Any]:
        """Values that SkyRL averages and logs under `environment/`."""
        return self._logs


def _template_arguments(env_config: Any, extras: Mapping[str, Any] | None) -> dict[str, Any]:  # noqa: ANN401
    """Those of the environment's configuration, a mapping or a data class, and those of the row."""
    name = "chat_template_kwargs"
    config = env_config.get(name) if hasattr(env_config, "get") else getattr(env_config, name, None)
    return {**arguments(config), **arguments((extras or {}).get(name))}
