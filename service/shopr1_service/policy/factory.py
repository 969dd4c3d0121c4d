"""Build a policy from a model in memory.

1. Check: random tokens go through the model itself. The first head and the first forward strategy whose
   numbers agree with it are chosen.
2. Warm up (CUDA): passes of the sizes that requests will have. The device chooses its kernels, and the peak
   of allocated memory is known afterwards.
3. Size the prefix cache: `memory_share · device memory − peak`.

Knows no files: `policy/loading.py` reads the model and the tokenizer.
"""

import logging
from collections.abc import Sequence
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shopr1_client.wire import PolicyInfo
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_rewards.self_certainty import Head
from shopr1_service.core import EngineStats, MeasuredCompletion, PromptKey, PromptScope, TokenGroup, Version
from shopr1_service.engine.engine import Engine
from shopr1_service.engine.forward.base import Forward, choose_forward
from shopr1_service.engine.forward.by_length import ByLengthForward
from shopr1_service.engine.forward.expanded import ExpandedForward
from shopr1_service.engine.forward.packed import PackedForward
from shopr1_service.engine.forward.shared_prefix import SharedPrefixForward
from shopr1_service.engine.heartbeat import Heartbeat
from shopr1_service.engine.lm_head import LinearHead, UnsupportedModelError, choose_head, trunk_of
from shopr1_service.engine.prefix_cache import PrefixCache
from shopr1_service.engine.rope_scaling import LengthDependentRope
from shopr1_service.errors import PolicyError
from shopr1_service.policy.load_progress import LoadProgress, Step
from shopr1_service.policy.local import LoadedPolicy
from shopr1_service.policy.tokenizer import PolicyTokenizer
from shopr1_service.settings import Settings

logger = logging.getLogger(__name__)

NUM_CHECK_TOKENS = 24
UNLIMITED = 10**9
"""More tokens than any sequence has. Transformers gives tokenizers without a limit 10³⁰."""
CPU_PREFIX_CACHE_BYTES = 2 * 2**30
WARM_UP_SHAPES = ((128, 8, 32), (1024, 8, 64), (4096, 16, 128), (16_384, 16, 128))
"""Tokens of the prompt, completions, tokens of each completion."""

_CHECK_SEED = 0
_NUM_PROBE_TOKENS = 4
"""A single token already passes through every weight; more tokens would only make updates slower."""
_PROBE_RULES = SelfCertaintyRecipe(alpha=0.005)
# Config attributes that limit how far a layer sees, or how many tokens it takes at a time.
_REACHES = ("sliding_window", "attention_chunk_size", "window_size", "chunk_size", "mamba_chunk_size")


def build_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    *,
    name: str,
    startup: LoadProgress | None = None,
) -> LoadedPolicy:
    """Check, warm up and wrap a model.

    Args:
        name: the policy's name in `/info` and logs.
        startup: receives the steps as they begin.

    Raises:
        PolicyError: self-certainty cannot be computed with this model.
    """
    startup = startup or LoadProgress()
    startup.enter(Step.CHECKING)
    model.train(False)
    num_ids = cast("torch.nn.Embedding", model.get_input_embeddings()).num_embeddings
    longest = longest_sequence(model, tokenizer)
    max_sequence_tokens = settings.max_sequence_tokens or longest
    if max_sequence_tokens is None:
        raise PolicyError("the policy declares no maximum sequence length; set max_sequence_tokens")
    random_ids, cache = check_ids(model, num_ids, longest), PrefixCache(UNLIMITED)
    rope, head, forward = _checked(model, random_ids, cache)
    engine = Engine(
        forward,
        head,
        max_sequence_tokens=max_sequence_tokens,
        num_tokenizer_tokens=len(tokenizer),
        release_memory=lambda: _release_memory(cache),
        rope=rope,
    )
    startup.enter(Step.WARMING_UP)
    cache.max_bytes = _prefix_cache_bytes(engine, model.device, random_ids, settings, max_sequence_tokens)
    cache.reset()
    engine.stats = EngineStats(cache.stats)
    info = _info(model, tokenizer, settings, name, max_sequence_tokens, head, forward)
    logger.info("%s is ready: %s", name, info.model_dump_json())
    return LoadedPolicy(
        info,
        PolicyTokenizer(tokenizer, num_ids, end_ids(model, tokenizer)),
        engine,
        _heartbeat_of(model),
        model,
        cache,
        renew=lambda: _renew(head, cache),
        probe=lambda version: engine.certainties([_probe_group(random_ids, version)], _PROBE_RULES),
        staging_dir=settings.staging_dir,
    )


def _checked(
    model: PreTrainedModel, random_ids: Sequence[int], cache: PrefixCache
) -> tuple[LengthDependentRope | None, Head, Forward]:
    """The fastest head and forward strategy that agree with the model."""
    try:
        rope = LengthDependentRope.of(model)
        head = choose_head(model, torch.tensor([random_ids[:NUM_CHECK_TOKENS]], device=model.device))
        forward = choose_forward(model, random_ids, _candidates(model, cache, rope))
        return rope, head, _by_length(forward, rope)
    except UnsupportedModelError as error:
        raise PolicyError(str(error)) from error


def _candidates(
    model: PreTrainedModel, cache: PrefixCache, rope: LengthDependentRope | None
) -> list[Forward]:
    """The strategies that share a prompt, fastest first."""
    strategies: list[Forward] = [SharedPrefixForward(model, cache), PackedForward(model), ExpandedForward(model)]
    return [_by_length(forward, rope) for forward in strategies]


def _by_length(forward: Forward, rope: LengthDependentRope | None) -> Forward:
    return forward if rope is None or isinstance(forward, ByLengthForward) else ByLengthForward(forward, rope)


def _heartbeat_of(model: PreTrainedModel) -> Heartbeat:
    """A heartbeat that beats at every pass of the model."""
    heartbeat = Heartbeat()
    trunk_of(model).register_forward_pre_hook(heartbeat.beat)
    return heartbeat


def _renew(head: Head, cache: PrefixCache) -> None:
    """Drop everything that was computed from the old weights."""
    if isinstance(head, LinearHead):
        head.renew()
    cache.clear()


def _release_memory(cache: PrefixCache) -> None:
    cache.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _probe_group(random_ids: Sequence[int], adapter: Version | None) -> TokenGroup:
    """A group of one short pass. Its last token is scored and therefore not fed."""
    *prompt_ids, last = random_ids[:_NUM_PROBE_TOKENS]
    return TokenGroup(PromptKey(prompt_ids, PromptScope(adapter)), [MeasuredCompletion([last], [0])])


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


# --- properties of the model and its tokenizer ------------------------------------------------------


def longest_sequence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The model's limit in tokens, else the tokenizer's; None if neither states one."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = limit or tokenizer.model_max_length
    return int(limit) if limit < UNLIMITED else None


def check_ids(model: PreTrainedModel, num_ids: int, longest: int | None) -> list[int]:
    """Random token ids for the checks: more than any layer sees at once, as far as the policy allows.

    The last of them are the completions in the check: they see only a part of the others, which are the
    prompt.
    """
    config = model.config.get_text_config()
    reach = max(getattr(config, name, None) or 0 for name in _REACHES)
    num_tokens = min(reach + NUM_CHECK_TOKENS, longest or UNLIMITED)
    generator = torch.Generator().manual_seed(_CHECK_SEED)
    ids: list[int] = torch.randint(num_ids, (num_tokens,), generator=generator).tolist()
    return ids


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that may follow an answer without belonging to it: end of turn, end of sequence, padding."""
    eos = model.generation_config.eos_token_id
    ids = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, tokenizer.pad_token_id]
    return sorted({token_id for token_id in ids if token_id is not None})


# --- memory -----------------------------------------------------------------------------------------


def _prefix_cache_bytes(
    engine: Engine, device: torch.device, random_ids: Sequence[int], settings: Settings, max_tokens: int
) -> int:
    """Warm up, then size the prefix cache."""
    if settings.deterministic:
        # A cache hit changes the order of sums, hence the last bits.
        return 0
    if device.type == "cuda":
        warm_up(engine, random_ids, _PROBE_RULES, max_tokens=max_tokens)
    if settings.prefix_cache_bytes is not None:
        return settings.prefix_cache_bytes
    peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return prefix_cache_bytes(device, settings.memory_share, peak_bytes=peak_bytes)


def prefix_cache_bytes(device: torch.device, memory_share: float, *, peak_bytes: int) -> int:
    """Bytes for the prefix cache: `memory_share · device memory − peak`, at least 0; on a CPU 2 GiB.

    Args:
        peak_bytes: the most that was allocated so far: the weights and the largest pass.
    """
    if device.type != "cuda":
        return CPU_PREFIX_CACHE_BYTES
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    left_bytes = max(0, int(total_bytes * memory_share) - peak_bytes)
    logger.info(
        "memory: %.1f GiB on the device, %.1f at the peak, %.1f for the prefix cache",
        *(num / 2**30 for num in (total_bytes, peak_bytes, left_bytes)),
    )
    return left_bytes


def warm_up(engine: Engine, token_ids: Sequence[int], rules: SelfCertaintyRecipe, *, max_tokens: int) -> None:
    """Run passes of the sizes in `WARM_UP_SHAPES`, cut to the longest sequence.

    Args:
        token_ids: any valid ids; repeated as often as needed.
        max_tokens: the longest sequence, in tokens.
    """
    for num_prompt, num_completions, num_own in WARM_UP_SHAPES:
        num_prompt = min(num_prompt, max_tokens - num_own)
        if num_prompt <= 0:
            return
        completions = [
            # Each begins with another token: identical completions would be computed once.
            MeasuredCompletion(
                [token_ids[i % len(token_ids)], *_repeat(token_ids, num_own - 1)], range(num_own)
            )
            for i in range(num_completions)
        ]
        engine.certainties([TokenGroup(PromptKey(_repeat(token_ids, num_prompt)), completions)], rules)


def _repeat(token_ids: Sequence[int], num_tokens: int) -> list[int]:
    return [token_ids[i % len(token_ids)] for i in range(num_tokens)]
