"""Warm-up passes, and the size of the prefix cache that they leave room for.

On CUDA, passes of the sizes that requests will have are run: the device chooses its kernels, and the peak of
allocated memory is known afterwards. The rest is the prefix cache:

    prefix cache = memory_share · device memory − peak
"""

import logging
from collections.abc import Sequence

import torch

from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import CompletionTokens, PromptKey, TokenGroup
from shopr1_service.engine.engine import Engine
from shopr1_service.settings import Settings

logger = logging.getLogger(__name__)

CPU_PREFIX_CACHE_BYTES = 2 * 2**30
WARM_UP_SHAPES = ((128, 8, 32), (1024, 8, 64), (4096, 16, 128), (16_384, 16, 128))
"""Tokens of the prompt, completions, tokens of each completion."""


def warm_up_and_size_cache(
    engine: Engine,
    device: torch.device,
    token_ids: Sequence[int],
    rules: SelfCertaintyRecipe,
    settings: Settings,
    *,
    max_tokens: int,
) -> int:
    """Warm up on CUDA, and return the bytes for the prefix cache.

    Args:
        token_ids, rules, max_tokens: as for `warm_up`.
    """
    if settings.deterministic:
        # A cache hit changes the order of sums, hence the last bits.
        return 0
    if device.type == "cuda":
        warm_up(engine, token_ids, rules, max_tokens=max_tokens)
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
