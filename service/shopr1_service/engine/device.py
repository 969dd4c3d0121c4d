"""The device: which one, in which precision, and how much of its memory prompts may keep.

The memory of a CUDA device is shared out so that nothing is left to chance:

    total · memory_share = weights + what the largest pass takes + keys and values of prompts

The second is measured at load, by passes of the sizes that will come (`warm_up`); the third is what is left.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from shopr1_service.errors import PolicyError
from shopr1_service.settings import DType

logger = logging.getLogger(__name__)

CPU_PREFIX_CACHE_BYTES = 2 * 2**30


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        PolicyError: no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise PolicyError(f"device {name!r}: {error}") from error


def choose_dtype(choice: DType, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it natively."""
    if choice is not DType.AUTO:
        return getattr(torch, choice.value)  # type: ignore[no-any-return]
    has_fast_bfloat16 = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_fast_bfloat16 else torch.float32


def token_tensor(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [rows, T] on the device. Pinned on the way: the copy does not wait for the device."""
    ids = torch.tensor([list(row) for row in rows], dtype=torch.long)
    return ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids.to(device)


def prefix_cache_bytes(device: torch.device, memory_share: float, *, peak_bytes: int) -> int:
    """What is left for keys and values of prompts.

    Args:
        peak_bytes: the most that was allocated so far: weights and the largest pass.
    """
    if device.type != "cuda":
        return CPU_PREFIX_CACHE_BYTES
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    left_bytes = int(total_bytes * memory_share) - peak_bytes
    logger.info(
        "memory: %.1f GiB in all, %.1f at the peak, %.1f for prompts",
        *(num / 2**30 for num in (total_bytes, peak_bytes, max(0, left_bytes))),
    )
    return max(0, left_bytes)
