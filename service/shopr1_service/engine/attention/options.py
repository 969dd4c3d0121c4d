"""Options of a layer's attention beyond scaled dot products with a causal mask."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionOptions:
    """Additions to a layer's attention.

    Attributes:
        window: tokens that a token sees, itself included; None: all before it.
        softcap: scores become softcap · tanh(score / softcap).
        sinks_A: for each query head, a score without a value: it only takes weight from the keys.
    """

    window: int | None = None
    softcap: float | None = None
    sinks_A: Tensor | None = None


PLAIN = AttentionOptions()
