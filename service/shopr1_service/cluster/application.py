"""The Ray Serve application: the HTTP side without a model, engines behind it, and their update coordinator.

serve run shopr1_service.cluster.application:build num_replicas=2
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt
from ray import serve
from ray.exceptions import ActorDiedError, RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shopr1_service.cluster.engine_metrics import QueuedTokens
from shopr1_service.cluster.engine_replica import Description, EngineReplica
from shopr1_service.cluster.messages import ClusterView
from shopr1_service.cluster.ray_router import AffinityRouter
from shopr1_service.cluster.remote_engines import RemoteEngines
from shopr1_service.cluster.update_coordinator import UpdateCoordinator
from shopr1_service.http.problems import REQUEST_ID_HEADER
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.scheduling.engine_client import OnFatal
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings, load_settings

ENGINES = "Engines"
_MAX_ONGOING = 1_000_000
"""Calls per replica. The limit that counts is `max_queue_tokens`, in tokens."""
_LIVENESS_TIMEOUT_S = 5.0
"""An engine that does not answer within this time is busy."""


class Scale(BaseModel):
    """Number of engines, and their resources."""

    model_config = ConfigDict(extra="forbid")

    num_replicas: PositiveInt = 1
    """Number of engines; with autoscaling, the lowest."""
    max_replicas: PositiveInt | None = None
    """Highest number of engines; None: no autoscaling."""
    target_queued_tokens: PositiveInt = 65_536
    """Queued tokens per engine above which autoscaling adds engines."""
    num_gpus: NonNegativeFloat = 0
    """GPUs per engine."""
    num_cpus: PositiveFloat = 1
    """CPUs per engine; also its number of threads."""
    missing_weight: PositiveInt = 1
    """Number of queued tokens that count as much as one token to compute (`Affinity`)."""
    rolling_updates: bool = False
    """Engines apply an update one after another, so that the others continue to score; not all at once."""


def build(options: Mapping[str, Any]) -> Any:  # noqa: ANN401  # Ray's application
    """Application builder for `serve run` and `serve deploy`.

    Args:
        options: members of `Scale`, and settings of the service, added to the environment and the TOML file.

    Raises:
        SettingsError: an unknown option or a malformed value.
        ValidationError: a malformed member of `Scale`.
    """
    scale = {name: value for name, value in options.items() if name in Scale.model_fields}
    settings = load_settings({name: value for name, value in options.items() if name not in scale})
    return application(Scale(**scale), settings)


class EngineDeployment(EngineReplica):
    """An engine that has the version of the others as soon as its constructor returns.

    Args:
        settings: output of `Settings.model_dump`.
        coordinator: Ray's handle.
    """

    async def __init__(self, settings: Mapping[str, Any], coordinator: Any) -> None:  # type: ignore[misc]  # noqa: ANN401
        super().__init__(settings, serve.get_replica_context().replica_id.unique_id)
        await self.join(coordinator, ray.get_runtime_context().current_actor)


class CoordinatorDeployment(UpdateCoordinator):
    """The update coordinator, in one replica for all engines.

    Args:
        settings: output of `Settings.model_dump`.
    """

    def __init__(self, settings: Mapping[str, Any], *, is_rolling: bool = False) -> None:
        super().__init__(Settings(**settings).staging_dir, is_rolling=is_rolling, is_alive=is_alive)


async def is_alive(actor: Any) -> bool:  # noqa: ANN401  # Ray's handle
    """Whether a process is alive. One that is busy or unreachable counts as alive: Ray decides about it."""
    try:
        async with asyncio.timeout(_LIVENESS_TIMEOUT_S):
            await actor.__ray_ready__.remote()
    except ActorDiedError:
        return False
    except (RayError, TimeoutError):
        return True
    return True


class Ingress:
    """The HTTP side: all of `shopr1 serve` but the engine.

    Args:
        engines, coordinator: Ray's handles.
        settings: output of `Settings.model_dump`.
    """

    def __init__(self, engines: Any, coordinator: Any, settings: Mapping[str, Any]) -> None:  # noqa: ANN401
        self._engines = engines
        self._coordinator = coordinator
        self._settings = Settings(**settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray in the replica: an application cannot be pickled."""
        app = create_app(self._settings, self._open_engines)
        app.add_middleware(_SingleRequestId)
        return app

    async def _open_engines(self, _settings: Settings, metrics: Metrics, _on_fatal: OnFatal) -> RemoteEngines:
        """Return when an engine is ready."""
        description: Description = await self._engines.describe.remote()
        view: ClusterView | None = None
        while view is None:
            view = await self._coordinator.view.remote()
        engines = RemoteEngines(self._engines, self._coordinator, description, view, metrics)
        engines.watch()
        return engines


def application(
    scale: Scale,
    settings: Settings,
    *,
    router: type = AffinityRouter,
    engine: type[EngineDeployment] = EngineDeployment,
) -> Any:  # noqa: ANN401
    """The application of `build`; benchmarks replace its router and its engine."""
    dumped, grace_s = settings.model_dump(), settings.shutdown_grace_s
    coordinators = _deployment(CoordinatorDeployment, "UpdateCoordinator", 0)  # its open polls need no answer
    coordinator = coordinators.bind(dumped, is_rolling=scale.rolling_updates)
    engines = _deployment(
        engine,
        ENGINES,
        grace_s,
        {"num_cpus": scale.num_cpus, "num_gpus": scale.num_gpus},
        request_router_config=_routing(scale, router),
        **_replica_options(scale),
    ).bind(dumped, coordinator)
    return _deployment(serve.ingress()(Ingress), "Ingress", grace_s).bind(engines, coordinator, dumped)


def _deployment(
    deployed: type,
    name: str,
    grace_s: float,
    resources: Mapping[str, float] | None = None,
    **options: Any,  # noqa: ANN401  # as `serve.deployment` takes them
) -> Any:  # noqa: ANN401
    return serve.deployment(
        deployed,
        name=name,
        ray_actor_options=resources or {"num_cpus": 0},
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=grace_s,
        **options,
    )


def _routing(scale: Scale, router: type) -> RequestRouterConfig:
    kwargs = {"missing_weight": scale.missing_weight} if issubclass(router, AffinityRouter) else {}
    return RequestRouterConfig(request_router_class=router, request_router_kwargs=kwargs)


def _replica_options(scale: Scale) -> dict[str, Any]:
    """Options of `serve.deployment` for the number of engines."""
    if scale.max_replicas is None:
        return {"num_replicas": scale.num_replicas}
    policy = AutoscalingPolicy(
        policy_function=QueuedTokens, policy_kwargs={"target_tokens": scale.target_queued_tokens}
    )
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=scale.num_replicas, max_replicas=scale.max_replicas, policy=policy
        )
    }


class _SingleRequestId:
    """ASGI middleware that drops the request id from the headers: Ray's proxy sends the same one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(raw=message["headers"])[REQUEST_ID_HEADER]
            await send(message)

        await self._app(scope, receive, send_without_id)
