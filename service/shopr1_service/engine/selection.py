"""The choice between several ways to compute the same numbers: right first, then fast."""

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

NUM_TIMED = 5

_Way = TypeVar("_Way")


def fastest_right(
    ways: Mapping[str, _Way],
    error_of: Callable[[_Way], float],
    limit: float,
    time_s_of: Callable[[_Way], float],
) -> str | None:
    """The name of the fastest way whose error is within the limit; None if there is none.

    A way that raises, or whose error is NaN, is not used. Only ways that are right are timed.

    Args:
        ways: by name.
        error_of: the largest error of a way.
        time_s_of: the duration of a way.

    Raises:
        torch.AcceleratorError: the device is unusable from now on.
    """
    times_s: dict[str, float] = {}
    for name, way in ways.items():
        try:
            error = error_of(way)
            if error <= limit:
                times_s[name] = time_s_of(way)
            else:
                logger.warning("%s is not used: its error is %.2g, more than %.2g", name, error, limit)
        except torch.AcceleratorError:
            raise
        except Exception as failure:  # compilers and libraries of a device raise anything
            logger.warning("%s is not used: %r", name, failure)
    if not times_s:
        return None
    logger.info(
        "measured: %s", ", ".join(f"{name} {1e3 * time_s:.3g} ms" for name, time_s in times_s.items())
    )
    return min(times_s, key=lambda name: times_s[name])


def device_time_s(call: Callable[[], object]) -> float:
    """Median duration of a call on CUDA, after one that chooses kernels."""
    call()
    times_s = []
    for _ in range(NUM_TIMED):
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s)
