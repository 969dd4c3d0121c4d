"""Duration of full weight updates by path, through the service's own route."""

from dataclasses import replace
from pathlib import Path

import httpx
import torch
from safetensors.torch import save_file

from benchmarks.gpu.models import engine_values, random_group, update_settings
from benchmarks.gpu.results import Budget, Outcome, Results, Row, dtype_name
from benchmarks.meters import time_s
from benchmarks.serving.local_server import served
from benchmarks.workloads import Shape
from shopr1_service.policy.loaded_policy import LoadedPolicy

CHECK_SHAPE = Shape(48, 2, 8)
NORM = "model.norm.weight"


def measure_update(
    policy: LoadedPolicy, directory: Path, budget: Budget, needed_s: float, results: Results
) -> None:
    """Save all weights, then update to them twice. The first update also saves the old weights.

    Args:
        directory: one of the policy's `policy_roots`.
        needed_s: with less time left, the update is skipped.
    """
    tensors = dict(policy.weights.tensors)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    workload = f"{num_bytes / 1e9:.3g} GB by path"
    row = Row("update", workload, "", dtype_name(policy.model.dtype), Outcome.SKIPPED)
    if budget.remaining_s < needed_s:
        results.add(
            replace(row, note=f"needs {needed_s:.0f} s, {max(0.0, budget.remaining_s):.0f} s are left")
        )
        return
    save_s = time_s(lambda: save_file(tensors, directory / "model.safetensors"))
    results.add(replace(row, method="save_file", outcome=Outcome.MEASURED, time_s=save_s, rounds=1))
    with served(update_settings(policy.model, directory), policy) as client:
        for method in ("first", "next"):
            results.add(_update(replace(row, method=method), policy, directory, client))


def _update(row: Row, policy: LoadedPolicy, directory: Path, client: httpx.Client) -> Row:
    """Change the weights, then take the saved ones: the values must be as before, bit for bit."""
    group = random_group(CHECK_SHAPE, policy.model.config.vocab_size, seed=1)
    expected_T = engine_values(policy, group)
    with torch.no_grad():
        policy.weights.tensors[NORM].mul_(2)
    changed_T = engine_values(policy, group)
    body = {"path": str(directory), "version": row.method}
    update = client.post("/policy/update", json=body).raise_for_status().json()
    is_right = torch.equal(engine_values(policy, group), expected_T) and not torch.equal(
        changed_T, expected_T
    )
    return replace(
        row,
        outcome=Outcome.PASS if is_right else Outcome.FAIL,
        time_s=update["duration_s"],
        rounds=1,
        note=f"pause {update['pause_s']:.3g} s" if is_right else "the values are not those of the weights",
    )
