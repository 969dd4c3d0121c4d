"""The policy under test: the embedded one, as the service loads it."""

import contextlib
import io
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.workloads import Plan, Shape, Workloads
from shopr1_rewards import load_recipe
from shopr1_service.core import TokenGroup
from shopr1_service.policy.factory import build_policy
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.policy.loading import EMBEDDED_NAME, find_source, load_model
from shopr1_service.settings import Settings, load_settings

RECIPE = load_recipe("shop_r1")
MEMORY_SHARE = 0.5  # of a GPU; the baselines need the other half


@dataclass(frozen=True)
class Subject:
    """A policy, and the model that it shares with the baselines.

    Attributes:
        policy: as the service runs it.
        uncached_policy: the same without a prefix cache.
    """

    settings: Settings
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    policy: LoadedPolicy
    uncached_policy: LoadedPolicy
    workloads: Workloads

    @property
    def device(self) -> torch.device:
        return self.model.device

    def run(self, group: TokenGroup) -> None:
        """Compute the self-certainty of a group."""
        self.policy.certainties([group], RECIPE.self_certainty)

    def run_new_prompt(self, shape: Shape) -> None:
        """Compute the self-certainty of a group whose prompt is not in the prefix cache."""
        self.run(self.workloads.group(shape))


def load_subject(dtype: str, plan: Plan) -> Subject:
    """Load the embedded policy, with and without a prefix cache, for sequences as long as the plan's."""
    settings = load_settings({"dtype": dtype, "memory_share": MEMORY_SHARE})
    tokenizer, model = load_embedded(settings)
    # Speed can be measured beyond the length that the policy was trained on.
    longest = max(plan.max_sequence_tokens, model.config.max_position_embeddings)
    settings = settings.model_copy(update={"max_sequence_tokens": longest})
    uncached_settings = settings.model_copy(update={"prefix_cache_bytes": 0})
    policy, uncached_policy = (
        build_policy(model, tokenizer, each, name=EMBEDDED_NAME) for each in (settings, uncached_settings)
    )
    return Subject(settings, tokenizer, model, policy, uncached_policy, Workloads(policy.codec))


def embedded_policy(settings: Settings) -> LoadedPolicy:
    """The embedded policy, as the service builds it."""
    tokenizer, model = load_embedded(settings)
    return build_policy(model, tokenizer, settings, name=EMBEDDED_NAME)


def load_embedded(settings: Settings) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model, without the progress bars that transformers draws while it reads GGUF files."""
    with contextlib.redirect_stderr(io.StringIO()):
        return load_model(find_source(None), settings)
