"""Clocks, memory and arithmetic of the device."""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from workloads import Shape

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
NUM_MATMULS = 20


def synchronize() -> None:
    """Wait for the GPU, if there is one: its kernels are only queued when a call returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_s(call: Callable[[], object]) -> float:
    synchronize()
    start_s = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start_s


def in_turns_s(num_runs: int, *calls: Callable[[], object], budget_s: float = math.inf) -> list[float]:
    """Median time of each call. They take turns, so that a busy moment of the machine meets all alike.

    Args:
        budget_s: no further turn begins once so much time has passed.
    """
    turns: list[list[float]] = []
    give_up_at = time.perf_counter() + budget_s
    while not turns or (len(turns) < num_runs and time.perf_counter() < give_up_at):
        turns.append([time_s(call) for call in calls])
    return [statistics.median(times_s) for times_s in zip(*turns, strict=True)]


def median_s(num_runs: int, call: Callable[[], object]) -> float:
    return in_turns_s(num_runs, call)[0]


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """How far a call raises the memory in use: allocated on CUDA, resident on a CPU (Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before_bytes = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before_bytes
    ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before_bytes = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before_bytes


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def matmul_flop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """What the device does at most, found with square matrices in the policy's dtype."""
    size = MATMUL_SIZE[device.type]
    matrix = torch.randn(size, size, device=device).to(dtype)
    best_s = min(time_s(lambda: matrix @ matrix.T) for _ in range(NUM_MATMULS))
    return 2 * size**3 / best_s


def needed_flop(model: transformers.PreTrainedModel, shape: Shape) -> float:
    """Of a forward that computes the prompt once: weights, causal attention, head."""
    config = model.config.get_text_config()
    num_weights = sum(p.numel() for name, p in model.named_parameters() if "layers" in name)
    num_pairs = shape.P**2 / 2 + shape.G * shape.R * (shape.P + shape.R / 2)
    attention = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * num_pairs
    head = 2 * shape.G * shape.R * config.hidden_size * config.vocab_size
    return float(2 * num_weights * shape.num_shared_tokens + attention + head)
