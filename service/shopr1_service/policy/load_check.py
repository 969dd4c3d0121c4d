"""The check at load, as the settings ask for it: in full, short, or an earlier outcome confirmed.

Random tokens go through the model itself. It must be causal. The first head and the first forward strategy
whose numbers agree with it are chosen.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shopr1_service.engine.forward.base import Forward, IndependentForward
from shopr1_service.engine.forward.branched import BranchedForward, has_states
from shopr1_service.engine.forward.by_length import ByLengthForward
from shopr1_service.engine.forward.comparison import MAX_SHORT_TOKENS
from shopr1_service.engine.forward.confirmation import confirms, depends_on_weights
from shopr1_service.engine.forward.expanded import ExpandedForward, SteppedForward
from shopr1_service.engine.forward.reach import Reach
from shopr1_service.engine.forward.self_check import Verdict, choose_forward
from shopr1_service.engine.forward.shared_prefix import SharedPrefixForward
from shopr1_service.engine.forward.unused_copy import unused_copy
from shopr1_service.engine.fused_head.choice import with_fastest_reduction
from shopr1_service.engine.lm_head import LinearHead, ModuleHead, UnsupportedModelError, choose_head
from shopr1_service.engine.prefix_cache import PrefixCache
from shopr1_service.engine.rope_scaling import LengthDependentRope
from shopr1_service.errors import PolicyError
from shopr1_service.policy.load_progress import LoadProgress
from shopr1_service.policy.positions import check_positions, longest_sequence
from shopr1_service.policy.verdict_cache import VERDICTS, KnownVerdict, VerdictCache, verdict_key
from shopr1_service.settings import Settings

logger = logging.getLogger(__name__)

NUM_CHECK_TOKENS = 24
_CHECK_SEED = 0
_MIN_DISTINCT = 8
"""Fewest different tokens in the check."""


@dataclass(frozen=True)
class CheckedModel:
    """The paths to compute with that agree with a model, and what the check found out for them.

    Attributes:
        num_ids: rows of the embedding.
        max_sequence_tokens: the longest sequence that is ever scored.
        random_ids: the tokens of the check.
        rope: of a model whose RoPE depends on the length.
    """

    num_ids: int
    max_sequence_tokens: int
    random_ids: Sequence[int]
    rope: LengthDependentRope | None
    head: LinearHead | ModuleHead
    verdict: Verdict


def check_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    cache: PrefixCache,
    progress: LoadProgress,
) -> CheckedModel:
    """Choose the fastest head and forward strategy that agree with a model before its first pass.

    Args:
        cache: of the strategy that keeps prompts.
        progress: receives a few words before each long pass.

    Raises:
        PolicyError: self-certainty cannot be computed with this model.
    """
    num_ids = cast("torch.nn.Embedding", model.get_input_embeddings()).num_embeddings
    longest = longest_sequence(model, tokenizer)
    max_sequence_tokens = settings.max_sequence_tokens or longest
    if max_sequence_tokens is None:
        raise PolicyError("the policy declares no maximum sequence length; set max_sequence_tokens")
    try:
        rope = LengthDependentRope.of(model)  # before any forward changes its state
        unused = unused_copy(model)
        check_positions(model, max_sequence_tokens, longest)
        random_ids = check_ids(model, num_ids, longest, max_sequence_tokens)
        ids_1_T = torch.tensor([random_ids[:NUM_CHECK_TOKENS]], device=model.device)
        head = choose_head(model, ids_1_T)
        if isinstance(head, LinearHead):
            head = with_fastest_reduction(head, model, ids_1_T)
        verdict = _Check(model, unused, cache, rope, settings, progress).verdict(random_ids)
    except UnsupportedModelError as error:
        raise PolicyError(str(error)) from error
    return CheckedModel(num_ids, max_sequence_tokens, random_ids, rope, head, verdict)


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


class _Check:
    """The check that the settings ask for.

    Args:
        unused: an `unused_copy` of the model from before its first pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        unused: PreTrainedModel,
        cache: PrefixCache,
        rope: LengthDependentRope | None,
        settings: Settings,
        progress: LoadProgress,
    ) -> None:
        self._model = model
        self._unused = unused
        self._rope = rope
        self._settings = settings
        self._progress = progress
        strategies: list[Forward] = [
            BranchedForward(model, cache) if has_states(model) else SharedPrefixForward(model, cache),
            ExpandedForward(model),
            SteppedForward(model),
        ]
        self._candidates = [self._by_length(forward) for forward in strategies]  # fastest first

    def verdict(self, random_ids: Sequence[int]) -> Verdict:
        """The outcome, also for completions whose RoPE depends on the length."""
        verdict = self._checked(random_ids)
        return replace(verdict, forward=self._by_length(verdict.forward))

    def _checked(self, random_ids: Sequence[int]) -> Verdict:
        is_short = self._settings.self_check == "short"
        ids = random_ids[:MAX_SHORT_TOKENS] if is_short else random_ids
        if self._settings.cache is None or depends_on_weights(self._model):
            verdict = self._full(ids)
        else:
            verdict = self._known_or_full(ids, VerdictCache(self._settings.cache / VERDICTS))
        if len(ids) == len(random_ids):
            return verdict
        remark = f"checked up to {len(ids)} tokens of {len(random_ids)}: self_check is short"
        return replace(verdict, remarks=(*verdict.remarks, remark))

    def _known_or_full(self, ids: Sequence[int], outcomes: VerdictCache) -> Verdict:
        """The outcome of an earlier check if the chosen strategy still agrees, else that of a check now."""
        key = verdict_key(self._model, len(ids))
        if (known := outcomes.get(key)) is not None:
            for forward in (*self._candidates, IndependentForward(self._model)):
                if forward.name == known.forward and confirms(self._model, ids, forward):
                    logger.info("the check at load is known to end with %s", known.forward)
                    return known.verdict(forward)
        verdict = self._full(ids)
        outcomes.put(key, KnownVerdict.of(verdict))
        return verdict

    def _full(self, ids: Sequence[int]) -> Verdict:
        return choose_forward(self._model, ids, self._candidates, self._progress.note, self._unused)

    def _by_length(self, forward: Forward) -> Forward:
        if self._rope is None or isinstance(forward, ByLengthForward):
            return forward
        return ByLengthForward(forward, self._rope)
