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

from benchmarks.workloads import Shape

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
NUM_MATMULS = 20


def synchronize() -> None:
    """Wait for the GPU, if there is one: a call returns when its kernels are queued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_s(call: Callable[[], object]) -> float:
    """Duration of one call, including its GPU kernels."""
    synchronize()
    start_s = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start_s


def interleaved_s(num_rounds: int, *calls: Callable[[], object], budget_s: float = math.inf) -> list[float]:
    """Median duration of each call. The calls alternate, so that a busy moment of the machine affects all.

    Args:
        budget_s: no further round starts once so much time has passed.
    """
    rounds: list[list[float]] = []
    deadline_s = time.perf_counter() + budget_s
    while not rounds or (len(rounds) < num_rounds and time.perf_counter() < deadline_s):
        rounds.append([time_s(call) for call in calls])
    return [statistics.median(times_s) for times_s in zip(*rounds, strict=True)]


def median_s(num_rounds: int, call: Callable[[], object]) -> float:
    """Median duration of one call."""
    return interleaved_s(num_rounds, call)[0]


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak memory of a call above the memory in use before: allocated on CUDA, resident on a CPU (Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before_bytes = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before_bytes
    ctypes.CDLL(None).malloc_trim(0)  # free memory that malloc retains would be reused without being counted
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before_bytes = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before_bytes


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, on CUDA with what PyTorch has reserved and does not use."""
    if device.type == "cuda":
        unused_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused_bytes
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def matmul_flop_per_s(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of square matrix products in the policy's dtype: the best of several runs."""
    size = size or MATMUL_SIZE[device.type]
    matrix = torch.randn(size, size, device=device).to(dtype)
    best_s = min(time_s(lambda: matrix @ matrix.T) for _ in range(NUM_MATMULS))
    return 2 * size**3 / best_s


def needed_flop(model: transformers.PreTrainedModel, shape: Shape) -> float:
    """FLOPs of a forward that computes the prompt once: layers, causal attention, head."""
    num_pairs = shape.P**2 / 2 + shape.G * shape.R * (shape.P + shape.R / 2)
    return _forward_flop(model, shape.num_shared_tokens, num_pairs, num_logit_rows=shape.G * shape.R)


def batch_flop(model: transformers.PreTrainedModel, shape: Shape, *, keeps_all: bool) -> float:
    """FLOPs of a batch of whole sequences, with the logits of all tokens or of the completions only."""
    num_pairs = shape.G * (shape.P + shape.R) ** 2 / 2
    num_logit_rows = shape.num_batch_tokens if keeps_all else shape.G * shape.R
    return _forward_flop(model, shape.num_batch_tokens, num_pairs, num_logit_rows=num_logit_rows)


def _forward_flop(
    model: transformers.PreTrainedModel, num_tokens: int, num_pairs: float, *, num_logit_rows: int
) -> float:
    """FLOPs of the layers' weights, of attention over token pairs, and of the head."""
    config = model.config.get_text_config()
    num_weights = sum(p.numel() for name, p in model.named_parameters() if "layers" in name)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_attention_heads * head_dim * config.num_hidden_layers * num_pairs
    head = 2 * num_logit_rows * config.hidden_size * config.vocab_size
    return float(2 * num_weights * num_tokens + attention + head)
