"""UpdateCoordinator and engines as Ray Serve deployments: what of them needs Ray."""

import asyncio
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorDiedError, RayError

from shopr1_service.cluster.engine_replica import EngineReplica
from shopr1_service.cluster.update_coordinator import UpdateCoordinator
from shopr1_service.settings import Settings

_LIFE_S = 5.0
"""Whoever does not answer within this is taken for busy."""


class JournalDeployment(UpdateCoordinator):
    """One replica, for all engines.

    Args:
        settings: as `Settings.model_dump` gives them.
    """

    def __init__(self, settings: Mapping[str, Any], *, is_rolling: bool = False) -> None:
        super().__init__(Settings(**settings).staging_dir, is_rolling=is_rolling, lives=lives)


class EngineDeployment(EngineReplica):
    """Ready as soon as it has been made: the policy then has the version that the other engines have.

    Args:
        settings: as `Settings.model_dump` gives them.
        journal: Ray's handle.
    """

    async def __init__(self, settings: Mapping[str, Any], journal: Any) -> None:  # type: ignore[misc]  # noqa: ANN401
        super().__init__(settings, serve.get_replica_context().replica_id.unique_id)
        await self.join(journal, ray.get_runtime_context().current_actor)


async def lives(actor: Any) -> bool:  # noqa: ANN401  # Ray's handle
    """Whether a process does. One that is busy, or out of reach, does: Ray decides what becomes of it."""
    try:
        async with asyncio.timeout(_LIFE_S):
            await actor.__ray_ready__.remote()
    except ActorDiedError:
        return False
    except (RayError, TimeoutError):
        return True
    return True
