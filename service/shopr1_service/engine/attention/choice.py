"""The choice of the kernel that attends without mask or softcap: verified on the device, then timed.

Which kernels a device has, and for which head sizes, depends on its generation and on PyTorch's build. Each
is compared with attention in fp64 before it is used.

Dimensions: A query heads, K key-value heads, R queries, W keys, D head size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shopr1_service.engine.attention.kernels import attend, kernels_of
from shopr1_service.engine.selection import device_time_s, fastest_right

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest accepted difference of outputs and of log-sum-exps. Queries, keys and values are of size 1."""
_CHECKED_SHAPES = ((1, 1, True), (150, 150, True), (70, 200, False), (1, 33, False))
"""Queries, keys, and whether causal: none a multiple of a kernel's tile."""
_TIMED_TOKENS = 4096


class KernelChoice:
    """The kernel for each number and size of heads: chosen when it first occurs, in the check at load."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, int, int, torch.dtype], str] = {}

    @property
    def name(self) -> str:
        """The kernels in use, shown by `/info`."""
        return ", ".join(sorted(set(self._names.values())))

    def of(self, query: Tensor, key: Tensor) -> str:
        """The kernel for queries [1, A, T, D] and keys [1, K, T, D]."""
        shape = (query.shape[1], key.shape[1], query.shape[-1], query.dtype)
        if shape not in self._names:
            self._names[shape] = _choose(query, key)
        return self._names[shape]


def _choose(query: Tensor, key: Tensor) -> str:
    *fused, written_out = kernels_of(query.device, query.dtype)
    if query.device.type != "cuda":
        return fused[0]
    return fastest_kernel(fused, query, key.shape[1]) or written_out


def fastest_kernel(names: Sequence[str], query: Tensor, num_kv_heads: int) -> str | None:
    """The fastest of these kernels that is right for such heads; None if none is."""
    num_heads, head_size = query.shape[1], query.shape[-1]
    rows, keys = (query.new_ones(1, heads, _TIMED_TOKENS, head_size) for heads in (num_heads, num_kv_heads))

    def error_of(kernel: str) -> float:
        return kernel_error(kernel, num_heads, num_kv_heads, head_size, query)

    def time_s_of(kernel: str) -> float:
        return device_time_s(lambda: attend(rows, keys, keys, None, is_causal=True, kernel=kernel))

    ways = {name: name for name in names}
    return fastest_right(ways, error_of, TOLERANCE[query.dtype], time_s_of)


def kernel_error(kernel: str, num_heads: int, num_kv_heads: int, head_size: int, like: Tensor) -> float:
    """The largest difference of a kernel's outputs and log-sum-exps from softmax in fp64.

    Args:
        like: gives dtype and device.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for num_queries, num_keys, is_causal in _CHECKED_SHAPES:
        query, key, value = (
            torch.randn(1, heads, length, head_size, generator=generator).to(like)
            for heads, length in (
                (num_heads, num_queries),
                (num_kv_heads, num_keys),
                (num_kv_heads, num_keys),
            )
        )
        actual = attend(query, key, value, None, is_causal=is_causal, kernel=kernel)
        expected = _exact(query.double(), key.double(), value.double(), is_causal)
        for ours, theirs in zip(actual, expected, strict=True):
            if ours.shape != theirs.shape:
                return math.inf
            difference = float((ours - theirs).abs().max())
            worst = max(worst, math.inf if math.isnan(difference) else difference)
    return worst


def _exact(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Softmax of all scores and its log-sum-exp, with repeated keys and values."""
    num_groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(num_groups, dim=1) for tensor in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return torch.softmax(scores, -1) @ value, torch.logsumexp(scores, -1)
