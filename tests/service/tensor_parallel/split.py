"""Policies that are split over two processes, on CPUs."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shopr1_service.engine import Certainty, MeasuredCompletion, TokenGroup
from shopr1_service.loaded_policy import Measured
from shopr1_service.loading import load_policy
from shopr1_service.settings import Settings
from shopr1_service.tensor_parallel.policy import SplitPolicy
from tests.service.models import byte_level, model_of, random_ids

TOLERANCE = 2e-5
"""Nats. Each device rounds its part of a sum by itself, in fp32, before the parts are added."""

on_cpus = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="transformers splits over accelerators where there are any"
)


def save(directory: Path, family: str = "llama") -> Path:
    model_of(family).save_pretrained(directory)
    byte_level().save_pretrained(directory)
    return directory


def settings_of(directory: Path, **options: Any) -> Settings:
    given = {"policy": str(directory), "dtype": "float32", "device": "cpu", "tensor_parallel": 2}
    return Settings(**{**given, **options})


@contextlib.contextmanager
def split_policy(directory: Path, **options: Any) -> Iterator[SplitPolicy]:
    policy = load_policy(settings_of(directory, **options))
    assert isinstance(policy, SplitPolicy)
    with contextlib.closing(policy):
        yield policy


def group_of(*, seed: int, num_prompt: int = 90, num_completions: int = 3) -> TokenGroup:
    """Completions of several lengths that begin alike, and one that comes twice."""
    lead = random_ids(2, seed=seed + 1)
    own = [[*lead, *random_ids(4 + i, seed=seed + 2 + i)] for i in range(num_completions)]
    completions = [MeasuredCompletion(ids, range(1, len(ids))) for ids in [*own, own[0]]]
    return TokenGroup(random_ids(num_prompt, seed=seed), completions)


def values(measured: Measured) -> list[float]:
    certainties = [each for own in measured for each in own]
    assert all(isinstance(each, Certainty) for each in certainties), certainties
    return [value for each in certainties if isinstance(each, Certainty) for value in each.values]
