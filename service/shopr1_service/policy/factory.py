"""Build a policy from a model in memory: check it, warm it up, wrap it with its tokenizer.

Knows no files: `policy/loading.py` reads the model and the tokenizer.
"""

import logging
from collections.abc import Sequence

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
from shopr1_service.engine.forward.self_check import Cause, Rejection
from shopr1_service.engine.heartbeat import Heartbeat
from shopr1_service.engine.lm_head import LinearHead, ModuleHead, trunk_of
from shopr1_service.engine.prefix_cache import PrefixCache
from shopr1_service.errors import PolicyError
from shopr1_service.policy.load_check import CheckedModel, check_model
from shopr1_service.policy.load_progress import LoadProgress, Step
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.policy.positions import UNLIMITED
from shopr1_service.policy.prompts.chat import ChatRenderer, read_templates
from shopr1_service.policy.prompts.end_tokens import end_ids, template_ends
from shopr1_service.policy.prompts.tokenizer import PolicyTokenizer
from shopr1_service.policy.warm_up import warm_up_and_size_cache
from shopr1_service.settings import Settings

logger = logging.getLogger(__name__)

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
    cache = PrefixCache(UNLIMITED)
    checked = check_model(model, tokenizer, settings, cache, startup)
    engine = _engine(checked, len(tokenizer), cache)
    startup.enter(Step.WARMING_UP)
    cache.max_bytes = warm_up_and_size_cache(
        engine,
        model.device,
        checked.random_ids,
        _PROBE_RULES,
        settings,
        max_tokens=checked.max_sequence_tokens,
    )
    cache.reset()
    engine.stats = EngineStats(cache.stats)
    info = _info(model, len(tokenizer), settings, name, checked)
    logger.info("%s is ready: %s", name, info.model_dump_json())
    return LoadedPolicy(
        info,
        _codec(model, tokenizer, checked.num_ids, settings),
        engine,
        _heartbeat_of(model),
        model,
        cache,
        renew=lambda: _renew(checked.head, cache),
        probe=lambda version: engine.certainties([_probe_group(checked.random_ids, version)], _PROBE_RULES),
        staging_dir=settings.staging_dir,
        ignored_tensors=settings.ignored_tensors,
    )


def _engine(checked: CheckedModel, num_tokenizer_tokens: int, cache: PrefixCache) -> Engine:
    return Engine(
        checked.verdict.forward,
        checked.head,
        max_sequence_tokens=checked.max_sequence_tokens,
        num_tokenizer_tokens=num_tokenizer_tokens,
        release_memory=lambda: _release_memory(cache),
        rope=checked.rope,
        feeds_whole=checked.verdict.feeds_whole,
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
    model: PreTrainedModel, num_tokenizer_tokens: int, settings: Settings, name: str, checked: CheckedModel
) -> PolicyInfo:
    head, verdict = checked.head, checked.verdict
    rejected = [*_rejected_heads(head), *verdict.rejected]
    return PolicyInfo(
        model=name,
        version=settings.policy_version,
        number=0,
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        num_head_rows=head.num_rows,
        num_tokenizer_tokens=num_tokenizer_tokens,
        max_sequence_tokens=checked.max_sequence_tokens,
        head=head.name,
        forward=verdict.forward.name,
        attention=verdict.forward.attention,
        rejected_paths=tuple(
            RejectedPath(path=each.path, reason=each.cause, detail=each.detail) for each in rejected
        ),
        remarks=verdict.remarks,
    )


def _rejected_heads(head: Head) -> list[Rejection]:
    return [Rejection("linear", Cause.DIFFERS, head.reason)] if isinstance(head, ModuleHead) else []
