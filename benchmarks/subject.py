"""The policy that is measured: the embedded one, as the service loads it."""

import contextlib
import io
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shopr1_rewards import load_recipe
from shopr1_service.core import TokenGroup
from shopr1_service.policy import factory as building
from shopr1_service.policy import loading
from shopr1_service.policy import loading as source
from shopr1_service.policy.local import LoadedPolicy
from shopr1_service.settings import Settings, load_settings
from workloads import Plan, Shape, Workloads

RECIPE = load_recipe("shop_r1")
MEMORY_SHARE = 0.5  # of a GPU; the baselines need the other half


@dataclass(frozen=True)
class Subject:
    """A policy, and the model that it shares with the baselines.

    Attributes:
        policy: as the service runs it.
        bare_policy: the same without a prefix cache.
    """

    settings: Settings
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    policy: LoadedPolicy
    bare_policy: LoadedPolicy
    workloads: Workloads

    @property
    def device(self) -> torch.device:
        return self.model.device

    def measure(self, group: TokenGroup) -> None:
        """The engine on a group."""
        self.policy.certainties([group], RECIPE.self_certainty)

    def measure_unknown(self, shape: Shape) -> None:
        """The engine on a prompt that it has never seen."""
        self.measure(self.workloads.group(shape))


def load_subject(dtype: str, plan: Plan) -> Subject:
    settings = load_settings({"dtype": dtype, "memory_share": MEMORY_SHARE})
    tokenizer, model = load_model(settings)
    # Speed can be measured beyond the length that the policy was trained on.
    longest = max(plan.max_sequence_tokens, model.config.max_position_embeddings)
    settings = settings.model_copy(update={"max_sequence_tokens": longest})
    bare_settings = settings.model_copy(update={"prefix_cache_bytes": 0})
    policy, bare_policy = (
        building.build_policy(model, tokenizer, each, name=source.EMBEDDED_NAME)
        for each in (settings, bare_settings)
    )
    return Subject(settings, tokenizer, model, policy, bare_policy, Workloads(policy.codec))


def load_model(settings: Settings) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model without the bars that transformers draws while it reads GGUF files."""
    with contextlib.redirect_stderr(io.StringIO()):
        return loading.load_model(source.find_source(None), settings)
