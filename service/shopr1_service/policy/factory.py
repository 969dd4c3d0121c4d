"""Build a policy from a model in memory.

1. Check: random tokens go through the model itself. It must be causal. The first head and the first forward
   strategy whose numbers agree with it are chosen.
2. Warm up (CUDA): passes of the sizes that requests will have. The device chooses its kernels, and the peak
   of allocated memory is known afterwards.
3. Size the prefix cache: `memory_share · device memory − peak`.

Knows no files: `policy/loading.py` reads the model and the tokenizer.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shopr1_client.wire import PolicyInfo, RejectedPath
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_rewards.self_certainty import Head
from shopr1_service.core import (
    CodecError,
    CompletionTokens,
    EngineStats,
    PromptKey,
    PromptScope,
    TokenGroup,
    Version,
)
from shopr1_service.engine.engine import Engine
from shopr1_service.engine.forward.base import Forward, IndependentForward
from shopr1_service.engine.forward.branched import BranchedForward, has_states
from shopr1_service.engine.forward.by_length import ByLengthForward
from shopr1_service.engine.forward.expanded import ExpandedForward, SteppedForward
from shopr1_service.engine.forward.reach import Reach
from shopr1_service.engine.forward.self_check import (
    MAX_SHORT_TOKENS,
    Cause,
    Rejection,
    Verdict,
    choose_forward,
    confirms,
    depends_on_weights,
)
from shopr1_service.engine.forward.shared_prefix import SharedPrefixForward
from shopr1_service.engine.forward.unused_copy import unused_copy
from shopr1_service.engine.heartbeat import Heartbeat
from shopr1_service.engine.lm_head import (
    LinearHead,
    ModuleHead,
    UnsupportedModelError,
    choose_head,
    trunk_of,
)
from shopr1_service.engine.prefix_cache import PrefixCache
from shopr1_service.engine.rope_scaling import LengthDependentRope
from shopr1_service.errors import PolicyError
from shopr1_service.policy.load_progress import LoadProgress, Step
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.policy.positions import UNLIMITED, check_positions, longest_sequence
from shopr1_service.policy.prompts.chat import ChatRenderer, read_templates
from shopr1_service.policy.prompts.end_tokens import end_ids, template_ends
from shopr1_service.policy.prompts.tokenizer import PolicyTokenizer
from shopr1_service.policy.verdict_cache import VERDICTS, KnownVerdict, VerdictCache, verdict_key
from shopr1_service.settings import Settings

logger = logging.getLogger(__name__)

NUM_CHECK_TOKENS = 24
CPU_PREFIX_CACHE_BYTES = 2 * 2**30
WARM_UP_SHAPES = ((128, 8, 32), (1024, 8, 64), (4096, 16, 128), (16_384, 16, 128))
"""Tokens of the prompt, completions, tokens of each completion."""

_CHECK_SEED = 0
_MIN_DISTINCT = 8
"""Fewest different tokens in the check."""
_NUM_PROBE_TOKENS = 4
"""A single token already passes through every weight; more tokens would only make updates slower."""
_PROBE_RULES = SelfCertaintyRecipe(alpha=0.005)


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
    _keep_weights_as_sent(model)
    num_ids = cast("torch.nn.Embedding", model.get_input_embeddings()).num_embeddings
    longest = longest_sequence(model, tokenizer)
    max_sequence_tokens = settings.max_sequence_tokens or longest
    if max_sequence_tokens is None:
        raise PolicyError("the policy declares no maximum sequence length; set max_sequence_tokens")
    rope = _controlled_rope(model)  # before any forward changes its state
    unused = unused_copy(model)
    check_positions(model, max_sequence_tokens, longest)
    random_ids, cache = check_ids(model, num_ids, longest, max_sequence_tokens), PrefixCache(UNLIMITED)
    head, verdict = _checked(model, unused, random_ids, _candidates(model, cache, rope), settings, startup)
    verdict = replace(verdict, forward=_by_length(verdict.forward, rope))
    engine = Engine(
        verdict.forward,
        head,
        max_sequence_tokens=max_sequence_tokens,
        num_tokenizer_tokens=len(tokenizer),
        release_memory=lambda: _release_memory(cache),
        rope=rope,
        feeds_whole=verdict.feeds_whole,
    )
    startup.enter(Step.WARMING_UP)
    cache.max_bytes = _prefix_cache_bytes(engine, model.device, random_ids, settings, max_sequence_tokens)
    cache.reset()
    engine.stats = EngineStats(cache.stats)
    info = _info(model, tokenizer, settings, name, max_sequence_tokens, head, verdict)
    logger.info("%s is ready: %s", name, info.model_dump_json())
    return LoadedPolicy(
        info,
        _codec(model, tokenizer, num_ids, settings),
        engine,
        _heartbeat_of(model),
        model,
        cache,
        renew=lambda: _renew(head, cache),
        probe=lambda version: engine.certainties([_probe_group(random_ids, version)], _PROBE_RULES),
        staging_dir=settings.staging_dir,
        ignored_tensors=settings.ignored_tensors,
    )


def _codec(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_ids: int, settings: Settings
) -> PolicyTokenizer:
    """The tokenizer with its chat templates and end tokens."""
    try:
        chat = ChatRenderer(tokenizer, read_templates(settings.chat_templates), settings.prompt_options)
    except CodecError as error:
        raise PolicyError(str(error)) from error
    _warn_of_ids_beyond(tokenizer, num_ids)
    if tokenizer.chat_template is not None or settings.chat_template is not None:
        chat.check()
    ends = (*template_ends(chat, tokenizer), *settings.end_tokens)
    codec = PolicyTokenizer(tokenizer, num_ids, end_ids(model, tokenizer), end_texts=ends, chat=chat)
    logger.info("end tokens after an answer: %s", ", ".join(map(repr, codec.end_tokens)) or "none")
    return codec


def _warn_of_ids_beyond(tokenizer: PreTrainedTokenizerBase, num_ids: int) -> None:
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= num_ids)
    if beyond:
        logger.warning(
            "the tokenizer has %d tokens that the policy has no embedding for, from %r on (id %d of %d): "
            "requests that contain one are refused",
            *(len(beyond), beyond[0][1], beyond[0][0], num_ids),
        )


def _controlled_rope(model: PreTrainedModel) -> LengthDependentRope | None:
    try:
        return LengthDependentRope.of(model)
    except UnsupportedModelError as error:
        raise PolicyError(str(error)) from error


def _checked(
    model: PreTrainedModel,
    unused: PreTrainedModel,
    random_ids: Sequence[int],
    candidates: Sequence[Forward],
    settings: Settings,
    startup: LoadProgress,
) -> tuple[Head, Verdict]:
    """The fastest head and forward strategy that agree with the model."""
    try:
        head = choose_head(model, torch.tensor([random_ids[:NUM_CHECK_TOKENS]], device=model.device))
        check = partial(choose_forward, model, unused=unused)
        return head, _verdict(model, check, random_ids, candidates, settings, startup)
    except UnsupportedModelError as error:
        raise PolicyError(str(error)) from error


def _verdict(
    model: PreTrainedModel,
    check: Callable[..., Verdict],
    random_ids: Sequence[int],
    candidates: Sequence[Forward],
    settings: Settings,
    startup: LoadProgress,
) -> Verdict:
    """The outcome of the check that the settings ask for, or of the same one at an earlier start."""
    checked_ids = random_ids[:MAX_SHORT_TOKENS] if settings.self_check == "short" else random_ids
    if settings.cache is None or depends_on_weights(model):
        verdict = check(checked_ids, candidates, startup.note)
    else:
        outcomes = VerdictCache(settings.cache / VERDICTS)
        verdict = _known_verdict(model, check, checked_ids, candidates, outcomes, startup)
    if len(checked_ids) == len(random_ids):
        return verdict
    remark = f"checked up to {len(checked_ids)} tokens of {len(random_ids)}: self_check is short"
    return replace(verdict, remarks=(*verdict.remarks, remark))


def _known_verdict(
    model: PreTrainedModel,
    check: Callable[..., Verdict],
    random_ids: Sequence[int],
    candidates: Sequence[Forward],
    outcomes: VerdictCache,
    startup: LoadProgress,
) -> Verdict:
    """The outcome of an earlier check if the chosen strategy still agrees, else that of a check now."""
    key = verdict_key(model, len(random_ids))
    if (known := outcomes.get(key)) is not None:
        for forward in (*candidates, IndependentForward(model)):
            if forward.name == known.forward and confirms(model, random_ids, forward):
                logger.info("the check at load is known to end with %s", known.forward)
                return known.verdict(forward)
    verdict = check(random_ids, candidates, startup.note)
    outcomes.put(key, KnownVerdict.of(verdict))
    return verdict


def _candidates(
    model: PreTrainedModel, cache: PrefixCache, rope: LengthDependentRope | None
) -> list[Forward]:
    """The strategies that share a prompt, fastest first."""
    strategies: list[Forward] = [
        BranchedForward(model, cache) if has_states(model) else SharedPrefixForward(model, cache),
        ExpandedForward(model),
        SteppedForward(model),
    ]
    return [_by_length(forward, rope) for forward in strategies]


def _by_length(forward: Forward, rope: LengthDependentRope | None) -> Forward:
    return forward if rope is None or isinstance(forward, ByLengthForward) else ByLengthForward(forward, rope)


def _keep_weights_as_sent(model: PreTrainedModel) -> None:
    """Stop RWKV from dividing weights by powers of two in its first pass, once: an update's would stay whole.

    The division keeps float16 from overflowing, and changes no number but by the epsilon of its norms.
    """
    config = model.config.get_text_config()
    if hasattr(config, "rescale_every"):
        config.rescale_every = 0


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
    return TokenGroup(PromptKey(prompt_ids, PromptScope(adapter)), [CompletionTokens([last], [0])])


def _info(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    name: str,
    max_sequence_tokens: int,
    head: Head,
    verdict: Verdict,
) -> PolicyInfo:
    rejected = [*_rejected_heads(head), *verdict.rejected]
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
        forward=verdict.forward.name,
        rejected_paths=tuple(
            RejectedPath(path=each.path, reason=each.cause, detail=each.detail) for each in rejected
        ),
        remarks=verdict.remarks,
    )


def _rejected_heads(head: Head) -> list[Rejection]:
    return [Rejection("linear", Cause.DIFFERS, head.reason)] if isinstance(head, ModuleHead) else []


# --- properties of the model and its tokenizer ------------------------------------------------------


def check_ids(
    model: PreTrainedModel, num_ids: int, longest: int | None, max_sequence_tokens: int
) -> list[int]:
    """Random token ids for the checks: more than any layer sees at once, as far as the policy is used.

    The last of them are the completions in the check: they see only a part of the others, which are the
    prompt.

    Args:
        longest: the longest sequence that the model allows.
        max_sequence_tokens: the longest that is ever scored: what shows in longer ones only does not matter.
    """
    num_tokens = min(Reach.of(model, max_sequence_tokens).num_tokens + NUM_CHECK_TOKENS, max_sequence_tokens)
    num_tokens = max(num_tokens, min(NUM_CHECK_TOKENS, longest or NUM_CHECK_TOKENS))
    generator = torch.Generator().manual_seed(_CHECK_SEED)
    # Tokens occur several times, as in text: a model that chooses keys by content then has to break ties.
    some = torch.randint(num_ids, (max(_MIN_DISTINCT, num_tokens // 4),), generator=generator)
    ids: list[int] = some[torch.randint(len(some), (num_tokens,), generator=generator)].tolist()
    return ids


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
            CompletionTokens(
                [token_ids[i % len(token_ids)], *_repeat(token_ids, num_own - 1)], range(num_own)
            )
            for i in range(num_completions)
        ]
        engine.certainties([TokenGroup(PromptKey(_repeat(token_ids, num_prompt)), completions)], rules)


def _repeat(token_ids: Sequence[int], num_tokens: int) -> list[int]:
    return [token_ids[i % len(token_ids)] for i in range(num_tokens)]
