"""Passes of the sizes that will come, before anybody waits for one.

On CUDA kernels are chosen and memory is set aside by size; what the largest of these passes takes is what the
memory budget counts with.
"""

from collections.abc import Sequence

from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.engine import Engine, MeasuredCompletion, TokenGroup

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
