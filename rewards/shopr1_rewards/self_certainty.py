r"""Self-certainty: how far a policy's next-token distribution is from uniform, over the whole vocabulary.

With z the logits that predict a token (after the model's own scaling and softcap, then divided by the
temperature), p = softmax(z), U uniform over the V tokens, per token and in nats:

    KL(U‖p) = logsumexp(z) − mean(z) − ln V      in [0, ∞)     Kang et al., arXiv 2502.18581; the default
    KL(p‖U) = ln V − H(p)                        in [0, ln V]
    Eq. 3   = KL(p‖U) / V                        as printed in Shop-R1, arXiv 2507.17842

Both are streamed over chunks of the vocabulary, so that no [T, V] tensor exists. A chunk is reduced in the
logits' precision (fp32 at least) to five numbers per token, and these are merged in fp64:

    m = max z,   n = number of logits,
    s = Σ exp(z − m),   a = Σ exp(z − m)·(z − m),   q = Σ (z − m)

    KL(U‖p) = ln(s/n) − q/n          KL(p‖U) = a/s − ln(s/n)

Sums are kept relative to m, not to 0: logits around ±10⁴ lose nothing, and a uniform distribution gives
exactly 0. Dimensions: T tokens, H hidden size, V vocabulary, C columns of a chunk.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shopr1_rewards.recipe import Divergence


class Head(Protocol):
    """From hidden states to logits, a chunk of the vocabulary at a time."""

    @property
    def num_rows(self) -> int:
        """V, the number of logits."""
        ...

    @property
    def max_tokens(self) -> int:
        """How many tokens the head should be given at once."""
        ...

    def logit_chunks(self, hidden_T_H: Tensor, num_rows: int) -> Iterator[Tensor]:
        """Logits of vocabulary entries 0 … num_rows − 1, in order, as [T, C] in fp32 or fp64."""
        ...


@dataclass(frozen=True)
class Divergences:
    """Per-token values in nats, fp64, on the CPU. Not finite where a logit was not finite or overflowed."""

    kl_u_p_T: Tensor
    kl_p_u_T: Tensor
    num_vocab: int

    def select(self, divergence: Divergence) -> Tensor:
        """The values that a recipe asks for, [T]."""
        match divergence:
            case Divergence.KL_U_P:
                return self.kl_u_p_T
            case Divergence.KL_P_U:
                return self.kl_p_u_T
            case Divergence.EQ3:
                return self.kl_p_u_T / self.num_vocab


@dataclass
class _State:
    """The five numbers of each token over the vocabulary seen so far, fp64."""

    max_T: Tensor
    exp_sum_T: Tensor
    exp_weighted_sum_T: Tensor
    sum_T: Tensor
    num_logits: int

    @classmethod
    def of(cls, logits_T_C: Tensor, temperature: float) -> "_State":
        max_T = logits_T_C.amax(dim=1)
        # Divided once the maximum is off: the quotients of large logits would be rounded.
        shifted_T_C = logits_T_C - max_T[:, None]
        if temperature != 1.0:
            shifted_T_C = shifted_T_C / temperature
        exp_T_C = shifted_T_C.exp()
        return cls(
            max_T=max_T.double() / temperature,
            exp_sum_T=exp_T_C.sum(dim=1, dtype=torch.float64),
            exp_weighted_sum_T=(exp_T_C * shifted_T_C).sum(dim=1, dtype=torch.float64),
            sum_T=shifted_T_C.sum(dim=1, dtype=torch.float64),
            num_logits=logits_T_C.shape[1],
        )

    def relative_to(self, max_T: Tensor) -> "_State":
        """The same state with its sums taken relative to a larger maximum."""
        shift_T = self.max_T - max_T
        scale_T = shift_T.exp()
        return _State(
            max_T=max_T,
            exp_sum_T=self.exp_sum_T * scale_T,
            exp_weighted_sum_T=(self.exp_weighted_sum_T + self.exp_sum_T * shift_T) * scale_T,
            sum_T=self.sum_T + self.num_logits * shift_T,
            num_logits=self.num_logits,
        )

    def merge(self, other: "_State") -> "_State":
        max_T = torch.maximum(self.max_T, other.max_T)
        left, right = self.relative_to(max_T), other.relative_to(max_T)
        return _State(
            max_T=max_T,
            exp_sum_T=left.exp_sum_T + right.exp_sum_T,
            exp_weighted_sum_T=left.exp_weighted_sum_T + right.exp_weighted_sum_T,
            sum_T=left.sum_T + right.sum_T,
            num_logits=left.num_logits + right.num_logits,
        )

    def divergences(self) -> Divergences:
        ln_mean_exp_T = (self.exp_sum_T / self.num_logits).log()
        kl_u_p_T = ln_mean_exp_T - self.sum_T / self.num_logits
        kl_p_u_T = self.exp_weighted_sum_T / self.exp_sum_T - ln_mean_exp_T
        # Both are divergences, hence ≥ 0; rounding may leave −1e-16. clamp keeps NaN.
        return Divergences(kl_u_p_T.clamp_min(0).cpu(), kl_p_u_T.clamp_min(0).cpu(), self.num_logits)


def divergences(
    hidden_T_H: Tensor, head: Head, *, temperature: float = 1.0, num_vocab: int | None = None
) -> Divergences:
    """KL(U‖p) and KL(p‖U) of every token's distribution.

    Args:
        hidden_T_H: the hidden state whose logits predict each token, [T, H], T may be 0.
        head: the policy's head.
        temperature: divides the logits, after the head's own softcap.
        num_vocab: V; the head's first `num_vocab` entries count. Default: all of them.

    Returns:
        Values of shape [T]; NaN or infinite exactly where a logit was.

    Raises:
        ValueError: a temperature that is not positive and finite, or a V that the head does not have.
    """
    num_vocab = head.num_rows if num_vocab is None else num_vocab
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if not 0 < num_vocab <= head.num_rows:
        raise ValueError(f"num_vocab must be in 1 … {head.num_rows}, not {num_vocab}")
    blocks = [
        _block_divergences(block_T_H, head, temperature, num_vocab)
        for block_T_H in torch.split(hidden_T_H, head.max_tokens)
        if block_T_H.shape[0]
    ]
    empty = torch.empty(0, dtype=torch.float64)
    return Divergences(
        kl_u_p_T=torch.cat([empty, *(block.kl_u_p_T for block in blocks)]),
        kl_p_u_T=torch.cat([empty, *(block.kl_p_u_T for block in blocks)]),
        num_vocab=num_vocab,
    )


def _block_divergences(hidden_T_H: Tensor, head: Head, temperature: float, num_vocab: int) -> Divergences:
    state: _State | None = None
    for logits_T_C in head.logit_chunks(hidden_T_H, num_vocab):
        chunk = _State.of(logits_T_C, temperature)
        state = chunk if state is None else state.merge(chunk)
    if state is None or state.num_logits != num_vocab:
        raise ValueError(f"the head did not give {num_vocab} logits")
    return state.divergences()
