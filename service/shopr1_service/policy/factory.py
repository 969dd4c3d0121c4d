"""A policy of a model in memory: head and forward are chosen by what they give on random tokens.

What is read from model and tokenizer: lengths, ends, and tokens that all layers can be checked with.

Passes of the sizes that will come, before anybody waits for one.

On CUDA kernels are chosen and memory is set aside by size; what the largest of these passes takes is what the
memory budget counts with.
"""

import logging
from collections.abc import Sequence
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shopr1_client.wire import PolicyInfo
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_rewards.self_certainty import Head
from shopr1_service.core import EngineStats, MeasuredCompletion, TokenGroup
from shopr1_service.engine.device import prefix_cache_bytes
from shopr1_service.engine.engine import Engine
from shopr1_service.engine.forward.base import Forward, choose_forward
from shopr1_service.engine.forward.expanded import ExpandedForward
from shopr1_service.engine.forward.packed import PackedForward
from shopr1_service.engine.forward.shared_prefix import SharedPrefixForward
from shopr1_service.engine.heartbeat import Heartbeat
from shopr1_service.engine.lm_head import LinearHead, choose_head, trunk_of
from shopr1_service.engine.prefix_cache import PrefixCache
from shopr1_service.errors import PolicyError
from shopr1_service.policy.load_progress import LoadProgress, Step
from shopr1_service.policy.local import LoadedPolicy
from shopr1_service.policy.tokenizer import PolicyTokenizer
from shopr1_service.settings import Settings

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
    startup: LoadProgress | None = None,
) -> LoadedPolicy:
    """See the module.

    Raises:
        PolicyError: its certainty cannot be measured.
    """
    startup = startup or LoadProgress()
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
        PolicyTokenizer(tokenizer, num_ids, end_ids(model, tokenizer)),
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


NUM_CHECK_TOKENS = 24
UNLIMITED = 10**9
"""More tokens than anything has. Transformers gives tokenizers without a limit 10³⁰."""
_CHECK_SEED = 0
# How far a layer sees, or how many tokens it takes at a time, in the words of all architectures.
_REACHES = ("sliding_window", "attention_chunk_size", "window_size", "chunk_size", "mamba_chunk_size")


def longest_sequence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = limit or tokenizer.model_max_length
    return int(limit) if limit < UNLIMITED else None


def check_ids(model: PreTrainedModel, num_ids: int, longest: int | None) -> list[int]:
    """Tokens for the checks: more than any layer sees at once, unless the policy takes no such sequence.

    So the last of them, which stand for completions, see only a part of those before, which are the prompt.
    """
    config = model.config.get_text_config()
    reach = max(getattr(config, name, None) or 0 for name in _REACHES)
    num_tokens = min(reach + NUM_CHECK_TOKENS, longest or UNLIMITED)
    generator = torch.Generator().manual_seed(_CHECK_SEED)
    ids: list[int] = torch.randint(num_ids, (num_tokens,), generator=generator).tolist()
    return ids


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What may follow an answer without belonging to it: end of turn, end of sequence, padding."""
    eos = model.generation_config.eos_token_id
    ids = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, tokenizer.pad_token_id]
    return sorted({token_id for token_id in ids if token_id is not None})


SHAPES = ((128, 8, 32), (1024, 8, 64), (4096, 16, 128), (16_384, 16, 128))
"""Prompt tokens, completions, tokens of each."""


def warm_up(engine: Engine, token_ids: Sequence[int], rules: SelfCertaintyRecipe, *, max_tokens: int) -> None:
    """Run the sizes that will come, as far as the policy takes them.

    Args:
        token_ids: any valid ids; repeated as often as needed.
        max_tokens: the longest sequence.
    """
    for num_prompt, num_completions, num_own in SHAPES:
        num_prompt = min(num_prompt, max_tokens - num_own)
        if num_prompt <= 0:
            return
        prompt = _repeat(token_ids, num_prompt)
        completions = [
            # Each begins with another token: identical ones would be computed once.
            MeasuredCompletion(
                [token_ids[i % len(token_ids)], *_repeat(token_ids, num_own - 1)], range(num_own)
            )
            for i in range(num_completions)
        ]
        engine.certainties([TokenGroup(prompt, completions)], rules)


def _repeat(token_ids: Sequence[int], num_tokens: int) -> list[int]:
    return [token_ids[i % len(token_ids)] for i in range(num_tokens)]
