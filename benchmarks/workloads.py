"""Groups of random prompts and valid completions, by shape, and the shapes of each benchmark.

A shape has P prompt tokens, G completions of the prompt, and R rationale tokens in each completion.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from shopr1_service.core import CompletionTokens, PromptKey, TokenGroup
from shopr1_service.policy.prompts.tokenizer import Codec

BEFORE_RATIONALE = '{"rationale": "'
AFTER_RATIONALE = '", "action": {"type": "terminate"}}'
MAX_FRAME_TOKENS = 64
"""Upper bound of the tokens before and after a rationale, with any tokenizer."""


@dataclass(frozen=True)
class Shape:
    """Size of a group."""

    P: int
    G: int
    R: int

    def __str__(self) -> str:
        return f"P{self.P} G{self.G} R{self.R}"

    @property
    def num_batch_tokens(self) -> int:
        """Tokens that a batch of whole sequences computes."""
        return self.G * (self.P + self.R)

    @property
    def num_shared_tokens(self) -> int:
        """Tokens that a forward computes when the completions share the prompt."""
        return self.P + self.G * self.R

    @property
    def ideal_ratio(self) -> float:
        """Token count of the batch relative to the shared forward: G(P+R) / (P+GR)."""
        return self.num_batch_tokens / self.num_shared_tokens


@dataclass(frozen=True)
class Plan:
    """Shapes of one run.

    Attributes:
        large: measured once; minutes on a CPU.
        budget_s: no further round of a section starts once it has taken so much time.
    """

    in_process: Sequence[Shape]
    large: Sequence[Shape]
    peak: Shape
    http: Sequence[Shape]
    sessions: Sequence[Shape]
    by_completions: Sequence[Shape]
    by_prompt: Sequence[Shape]
    budget_s: float = math.inf

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence of all shapes. It may exceed the length that the policy was trained on."""
        shapes = [*self.in_process, *self.large, self.peak, *self.http, *self.sessions]
        shapes += [*self.by_completions, *self.by_prompt]
        return max(shape.P + shape.R for shape in shapes) + MAX_FRAME_TOKENS


PLANS = {
    "cpu": Plan(
        in_process=[Shape(2000, 8, 64)],
        large=[Shape(6000, 16, 64)],
        peak=Shape(6000, 16, 200),
        http=[Shape(2000, 8, 64), Shape(2000, 16, 64)],
        sessions=[Shape(6000, 8, 64), Shape(6000, 1, 64)],
        by_completions=[Shape(2000, G, 64) for G in (1, 2, 4, 8, 16, 32)],
        by_prompt=[Shape(P, 8, 64) for P in (250, 500, 1000, 2000, 4000)],
    ),
    "cuda": Plan(
        in_process=[Shape(2000, 8, 64), Shape(8000, 16, 64)],
        large=[Shape(32_000, 16, 64)],
        peak=Shape(32_000, 16, 200),
        http=[Shape(8000, 8, 64), Shape(8000, 16, 64)],
        sessions=[Shape(32_000, 8, 64), Shape(32_000, 1, 64)],
        by_completions=[Shape(8000, G, 64) for G in (1, 2, 4, 8, 16, 32)],
        by_prompt=[Shape(P, 8, 64) for P in (1000, 2000, 4000, 8000, 16_000, 32_000)],
    ),
    "tiny": Plan(
        in_process=[Shape(200, 4, 16)],
        large=[Shape(400, 4, 16)],
        peak=Shape(400, 4, 16),
        http=[Shape(200, 4, 16)],
        sessions=[Shape(400, 4, 16)],
        by_completions=[Shape(200, G, 16) for G in (1, 2, 4)],
        by_prompt=[Shape(P, 4, 16) for P in (50, 100, 200)],
    ),
}

QUICK_PLANS = {
    "cpu": replace(
        PLANS["cpu"],
        in_process=[Shape(1000, 8, 32)],
        large=[],
        peak=Shape(2000, 16, 64),
        http=[Shape(1000, 8, 32)],
        sessions=[Shape(2000, 8, 32)],
        budget_s=30.0,
    ),
    "cuda": replace(
        PLANS["cuda"],
        large=[],
        peak=Shape(8000, 16, 200),
        http=[Shape(8000, 8, 64)],
        sessions=[Shape(8000, 8, 64)],
        budget_s=30.0,
    ),
}
"""Plans of three minutes, by device."""


class Workloads:
    """Groups of any shape in the tokens of one policy."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._generator = torch.Generator().manual_seed(0)

    def prompt_ids(self, num_tokens: int) -> list[int]:
        """Random tokens. Each call draws new ones, so that no prompt is in the prefix cache."""
        num_ids = self._codec.num_ids
        ids: list[int] = torch.randint(
            num_ids // 50, num_ids, (num_tokens,), generator=self._generator
        ).tolist()
        return ids

    def completions(self, shape: Shape) -> list[list[int]]:
        """Valid completions that differ within the first eight tokens of their rationales."""
        before, after = self._ids(BEFORE_RATIONALE), self._ids(AFTER_RATIONALE)
        filler = self._ids(" mug")[0]
        words = [self._ids(f" {word}")[0] for word in ("set", "blue", "new", "old")]
        return [
            [*before, *(words[(i >> k) % 4] if k < 8 else filler for k in range(shape.R)), *after]
            for i in range(shape.G)
        ]

    def group(self, shape: Shape, prompt_ids: Sequence[int] | None = None) -> TokenGroup:
        """A group that measures its rationales. Without `prompt_ids` it has a new random prompt."""
        first = len(self._ids(BEFORE_RATIONALE))
        measured = range(first, first + shape.R)
        completions = [CompletionTokens(ids, measured) for ids in self.completions(shape)]
        return TokenGroup(PromptKey(prompt_ids or self.prompt_ids(shape.P)), completions)

    def _ids(self, text: str) -> Sequence[int]:
        return self._codec.encode_text(text).ids
