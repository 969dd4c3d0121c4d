r"""Self-certainty: how far a policy's next-token distribution is from uniform, over the whole vocabulary.

With z the logits that predict a token (after the model's own scaling and softcap, then divided by the
temperature), p = softmax(z), U uniform over the V tokens, per token and in nats:

    KL(U‖p) = logsumexp(z) − mean(z) − ln V      in [0, ∞)     Kang et al., arXiv 2502.18581; the default
    KL(p‖U) = ln V − H(p)                        in [0, ln V]
    Eq. 3   = KL(p‖U) / V                        as printed in Shop-R1, arXiv 2507.17842

They are streamed over chunks of the vocabulary, so that no [T, V] tensor exists. A chunk is reduced in the
logits' precision (fp32 at least) to a few numbers per token, and these are merged in fp64:

    m = max z,   n = number of logits,   s = Σ exp(z − m) = 1 / max softmax(z)
    q = Σ (z − m)                        for KL(U‖p), where the head does not know mean(z) without the logits
    a = Σ exp(z − m)·(z − m)             for KL(p‖U)

    KL(U‖p) = ln(s/n) − q/n = m + ln(s/n) − mean(z)          KL(p‖U) = a/s − ln(s/n)

Sums are kept relative to m, not to 0: logits around ±10⁴ lose nothing. Dimensions: T tokens, H hidden size,
V vocabulary, C columns of a chunk.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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

    def mean_logits(self, hidden_T_H: Tensor, num_rows: int) -> Tensor | None:
        """Mean of logits 0 … num_rows − 1 of each token, [T] in fp64; None where it needs all of them.

        Where logits are linear in the hidden state it is one product: mean(h·Wᵀ) = h·mean(W).
        """
        ...


@dataclass
class LogitSums:
    """The numbers of each token over the vocabulary seen so far, fp64. `None`: not asked for.

    Attributes:
        max_T: m, divided by the temperature.
        exp_sum_T, exp_weighted_sum_T, sum_T: s, a and q.
    """

    max_T: Tensor
    exp_sum_T: Tensor
    exp_weighted_sum_T: Tensor | None
    sum_T: Tensor | None
    num_logits: int

    @classmethod
    def of(cls, logits_T_C: Tensor, temperature: float, *, weighs: bool, sums: bool) -> "LogitSums":
        max_T = logits_T_C.amax(dim=1)
        shifted_T_C = logits_T_C
        if weighs or sums or temperature != 1.0:
            # Divided once the maximum is off: the quotients of large logits would be rounded.
            shifted_T_C = (logits_T_C - max_T[:, None]) / temperature
        # One fused pass; exponentials written out take several times as long.
        p_T_C = torch.softmax(shifted_T_C, dim=1)
        exp_sum_T = 1 / p_T_C.amax(dim=1).double()
        return cls(
            max_T=max_T.double() / temperature,
            exp_sum_T=exp_sum_T,
            exp_weighted_sum_T=(p_T_C * shifted_T_C).sum(dim=1, dtype=torch.float64) * exp_sum_T
            if weighs
            else None,
            sum_T=shifted_T_C.sum(dim=1, dtype=torch.float64) if sums else None,
            num_logits=logits_T_C.shape[1],
        )

    def relative_to(self, max_T: Tensor) -> "LogitSums":
        """The same state with its sums taken relative to a larger maximum."""
        shift_T = self.max_T - max_T
        scale_T = shift_T.exp()
        weighted_T, sum_T = self.exp_weighted_sum_T, self.sum_T
        return LogitSums(
            max_T=max_T,
            exp_sum_T=self.exp_sum_T * scale_T,
            exp_weighted_sum_T=None
            if weighted_T is None
            else (weighted_T + self.exp_sum_T * shift_T) * scale_T,
            sum_T=None if sum_T is None else sum_T + self.num_logits * shift_T,
            num_logits=self.num_logits,
        )

    def merge(self, other: "LogitSums") -> "LogitSums":
        max_T = torch.maximum(self.max_T, other.max_T)
        left, right = self.relative_to(max_T), other.relative_to(max_T)
        return LogitSums(
            max_T=max_T,
            exp_sum_T=left.exp_sum_T + right.exp_sum_T,
            exp_weighted_sum_T=_plus(left.exp_weighted_sum_T, right.exp_weighted_sum_T),
            sum_T=_plus(left.sum_T, right.sum_T),
            num_logits=left.num_logits + right.num_logits,
        )

    def kl_u_p(self, mean_T: Tensor | None) -> Tensor:
        ln_mean_exp_T = (self.exp_sum_T / self.num_logits).log()
        if mean_T is not None:
            return ln_mean_exp_T + (self.max_T - mean_T)
        assert self.sum_T is not None
        return ln_mean_exp_T - self.sum_T / self.num_logits

    def kl_p_u(self) -> Tensor:
        assert self.exp_weighted_sum_T is not None
        return self.exp_weighted_sum_T / self.exp_sum_T - (self.exp_sum_T / self.num_logits).log()


@runtime_checkable
class ReducingHead(Head, Protocol):
    """A head that reduces its logits itself, where that is faster than writing them down."""

    def sums(
        self, hidden_T_H: Tensor, num_rows: int, temperature: float, *, weighs: bool, sums: bool
    ) -> LogitSums:
        """The numbers over vocabulary entries 0 … num_rows − 1.

        Args:
            weighs: whether a is asked for.
            sums: whether q is asked for.
        """
        ...


def _plus(left_T: Tensor | None, right_T: Tensor | None) -> Tensor | None:
    return None if left_T is None or right_T is None else left_T + right_T


def divergences(
    hidden_T_H: Tensor,
    head: Head,
    divergence: Divergence,
    *,
    temperature: float = 1.0,
    num_vocab: int | None = None,
) -> Tensor:
    """The divergence of every token's distribution from the uniform one.

    Args:
        hidden_T_H: the hidden state whose logits predict each token, [T, H], T may be 0.
        head: the policy's head.
        divergence: definition; the formulas are at the top of this module.
        temperature: divides the logits, after the head's own softcap.
        num_vocab: V; the head's first `num_vocab` entries count. Default: all of them.

    Returns:
        Values in nats (eq3: nats / V) of shape [T], fp64, on the CPU; not finite where a logit was not
        finite or overflowed.

    Raises:
        ValueError: a temperature that is not positive and finite, or a V that the head does not have.
    """
    num_vocab = head.num_rows if num_vocab is None else num_vocab
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if not 0 < num_vocab <= head.num_rows:
        raise ValueError(f"num_vocab must be in 1 … {head.num_rows}, not {num_vocab}")
    blocks_T = [
        _block(block_T_H, head, divergence, temperature, num_vocab)
        for block_T_H in torch.split(hidden_T_H, head.max_tokens)
        if block_T_H.shape[0]
    ]
    return torch.cat([torch.empty(0, dtype=torch.float64), *blocks_T])


def _block(
    hidden_T_H: Tensor, head: Head, divergence: Divergence, temperature: float, num_vocab: int
) -> Tensor:
    is_kl_u_p = divergence is Divergence.KL_U_P
    mean_T = head.mean_logits(hidden_T_H, num_vocab) if is_kl_u_p else None
    weighs, sums = not is_kl_u_p, is_kl_u_p and mean_T is None
    state: LogitSums | None = None
    if isinstance(head, ReducingHead):
        state = head.sums(hidden_T_H, num_vocab, temperature, weighs=weighs, sums=sums)
    else:
        for logits_T_C in head.logit_chunks(hidden_T_H, num_vocab):
            chunk = LogitSums.of(logits_T_C, temperature, weighs=weighs, sums=sums)
            state = chunk if state is None else state.merge(chunk)
    if state is None or state.num_logits != num_vocab:
        raise ValueError(f"the head did not give {num_vocab} logits")
    if is_kl_u_p:
        values_T = state.kl_u_p(None if mean_T is None else mean_T / temperature)
    else:
        values_T = state.kl_p_u() / (num_vocab if divergence is Divergence.EQ3 else 1)
    # Divergences are ≥ 0; rounding may leave −1e-16. clamp keeps NaN.
    return values_T.clamp_min(0).cpu()
