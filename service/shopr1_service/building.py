"""A policy of a model in memory: head and forward are chosen by what they give on random tokens."""

import logging
from collections.abc import Sequence
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shopr1_client.wire import PolicyInfo
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_rewards.self_certainty import Head
from shopr1_service.codec import PolicyCodec
from shopr1_service.device import prefix_cache_bytes
from shopr1_service.engine import Engine, EngineStats, MeasuredCompletion, TokenGroup
from shopr1_service.errors import PolicyError
from shopr1_service.expanded_forward import ExpandedForward
from shopr1_service.forward import Forward, choose_forward
from shopr1_service.head import LinearHead, choose_head, trunk_of
from shopr1_service.heartbeat import Heartbeat
from shopr1_service.loaded_policy import LoadedPolicy
from shopr1_service.packed_forward import PackedForward
from shopr1_service.prefix import PrefixCache
from shopr1_service.settings import Settings
from shopr1_service.shared_forward import SharedPrefixForward
from shopr1_service.startup import Startup, Step
from shopr1_service.traits import NUM_CHECK_TOKENS, UNLIMITED, check_ids, end_ids, longest_sequence
from shopr1_service.warm_up import warm_up

logger = logging.getLogger(__name__)

_NUM_PROBE_TOKENS = 4
"""Each passes through every weight; more of them would only lengthen the pause of an update."""
_WARM_UP_RULES = SelfCertaintyRecipe(alpha=0.005)


def build_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    *,
    name: str,
    startup: Startup | None = None,
) -> LoadedPolicy:
    """See the module.

    Raises:
        PolicyError: its certainty cannot be measured.
    """
    startup = startup or Startup()
    startup.enter(Step.CHECKING)
    model.train(False)
    num_ids = cast("torch.nn.Embedding", model.get_input_embeddings()).num_embeddings
    longest = longest_sequence(model, tokenizer)
    max_sequence_tokens = settings.max_sequence_tokens or longest
    if max_sequence_tokens is None:
        raise PolicyError("the policy states no longest sequence; set max_sequence_tokens")
    random_ids, cache = check_ids(model, num_ids, longest), PrefixCache(UNLIMITED)
    head = choose_head(model, torch.tensor([random_ids[:NUM_CHECK_TOKENS]], device=model.device))
    forward = choose_forward(model, random_ids, _candidates(model, cache))
    engine = Engine(
        forward,
        head,
        max_sequence_tokens=max_sequence_tokens,
        num_tokenizer_tokens=len(tokenizer),
        release_memory=lambda: _release_memory(cache),
    )
    startup.enter(Step.WARMING_UP)
    cache.max_bytes = _cache_bytes(engine, model.device, random_ids, settings, max_sequence_tokens)
    cache.reset()
    engine.stats = EngineStats(cache.stats)
    info = _info(model, tokenizer, settings, name, max_sequence_tokens, head, forward)
    logger.info("%s is ready: %s", name, info.model_dump_json())
    heartbeat = Heartbeat()
    trunk_of(model).register_forward_pre_hook(heartbeat.beat)
    return LoadedPolicy(
        info,
        PolicyCodec(tokenizer, num_ids, end_ids(model, tokenizer)),
        engine,
        heartbeat,
        model,
        cache,
        renew=lambda: _renew(head, cache),
        probe=lambda: engine.certainties([_probe_group(random_ids)], _WARM_UP_RULES),
        staging_dir=settings.staging_dir,
    )


def _candidates(model: PreTrainedModel, cache: PrefixCache) -> list[Forward]:
    """The fastest first."""
    return [SharedPrefixForward(model, cache), PackedForward(model), ExpandedForward(model)]


def _renew(head: Head, cache: PrefixCache) -> None:
    """The weights have changed."""
    if isinstance(head, LinearHead):
        head.renew()
    cache.enter(None)
    cache.clear()


def _probe_group(random_ids: Sequence[int]) -> TokenGroup:
    """One pass: of all its tokens the last one is measured, which is not fed."""
    *prompt_ids, last = random_ids[:_NUM_PROBE_TOKENS]
    return TokenGroup(prompt_ids, [MeasuredCompletion([last], [0])])


def _cache_bytes(
    engine: Engine, device: torch.device, random_ids: Sequence[int], settings: Settings, max_tokens: int
) -> int:
    if settings.deterministic:
        # Whether a prompt's beginning was known changes the order of sums, hence the last bits.
        return 0
    if device.type == "cuda":
        warm_up(engine, random_ids, _WARM_UP_RULES, max_tokens=max_tokens)
    if settings.prefix_cache_bytes is not None:
        return settings.prefix_cache_bytes
    peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return prefix_cache_bytes(device, settings.memory_share, peak_bytes=peak_bytes)


def _release_memory(cache: PrefixCache) -> None:
    cache.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _info(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    name: str,
    max_sequence_tokens: int,
    head: Head,
    forward: Forward,
) -> PolicyInfo:
    return PolicyInfo(
        model=name,
        version=settings.policy_version,
        number=0,
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        num_head_rows=head.num_rows,
        num_tokenizer_tokens=len(tokenizer),
        max_sequence_tokens=max_sequence_tokens,
        head="linear" if isinstance(head, LinearHead) else "module",
        forward=forward.name,
    )
