"""The Ray Serve application: the HTTP service in front, without a model, and engines behind it.

serve run shopr1_service.cluster.application:build num_replicas=2
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shopr1_service.cluster.autoscaling import QueuedTokens
from shopr1_service.cluster.deployments import EngineDeployment, JournalDeployment
from shopr1_service.cluster.engine_replica import Description
from shopr1_service.cluster.ray_router import AffinityRouter
from shopr1_service.cluster.remote_policy import RemoteEngines
from shopr1_service.cluster.routing_view import View
from shopr1_service.http.request_context import REQUEST_ID_HEADER
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.scheduling.engine_client import OnFatal
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings, load_settings

ENGINES = "Engines"
INGRESS = "Ingress"
JOURNAL = "UpdateCoordinator"
_MAX_ONGOING = 1_000_000
"""Calls that a replica may have at a time. What bounds them is its `max_queue_tokens`, in tokens."""


class Scale(BaseModel):
    """How many engines, and what each takes of a machine."""

    model_config = ConfigDict(extra="forbid")

    num_replicas: PositiveInt = 1
    """Engines; where their number may change, the fewest."""
    max_replicas: PositiveInt | None = None
    """The most engines; None: their number does not change."""
    target_queued_tokens: PositiveInt = 65_536
    """So many may wait for each, before there are more."""
    num_gpus: NonNegativeFloat = 0
    """Of each engine."""
    num_cpus: PositiveFloat = 1
    """Of each engine; also the number of threads that it computes with."""
    missing_weight: PositiveInt = 1
    """How many tokens that wait a token is worth that an engine would have to compute (`Affinity`)."""
    rolling_updates: bool = False
    """Engines take new weights one after another, and the others go on scoring; not all at once."""


def build(options: Mapping[str, Any]) -> Any:  # noqa: ANN401  # Ray's application
    """An application builder, as `serve run` and `serve deploy` take it.

    Args:
        options: members of `Scale`, and settings of the service; environment and TOML file count, too.

    Raises:
        SettingsError: an unknown option or a malformed value.
        ValidationError: a malformed member of `Scale`.
    """
    of_scale = {name: value for name, value in options.items() if name in Scale.model_fields}
    settings = load_settings({name: value for name, value in options.items() if name not in of_scale})
    return application(Scale(**of_scale), settings)


def application(
    scale: Scale,
    settings: Settings,
    *,
    router: type = AffinityRouter,
    engine: type[EngineDeployment] = EngineDeployment,
) -> Any:  # noqa: ANN401
    """What `build` gives, with another router or engine, as benchmarks want."""
    dumped = settings.model_dump()
    engines = serve.deployment(
        engine,
        name=ENGINES,
        **_number(scale),
        ray_actor_options={"num_cpus": scale.num_cpus, "num_gpus": scale.num_gpus},
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=settings.shutdown_grace_s,
        request_router_config=_routing(scale, router),
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=settings.shutdown_grace_s,
    )
    journal = serve.deployment(
        JournalDeployment,
        name=JOURNAL,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=0,  # its questions stay open, and nobody needs their answers
    ).bind(dumped, is_rolling=scale.rolling_updates)
    return ingress.bind(engines.bind(dumped, journal), journal, dumped)


def _routing(scale: Scale, router: type) -> RequestRouterConfig:
    kwargs = {"missing_weight": scale.missing_weight} if issubclass(router, AffinityRouter) else {}
    return RequestRouterConfig(request_router_class=router, request_router_kwargs=kwargs)


def _number(scale: Scale) -> dict[str, Any]:
    """Of engines, as `serve.deployment` takes it."""
    if scale.max_replicas is None:
        return {"num_replicas": scale.num_replicas}
    policy = AutoscalingPolicy(
        policy_function=QueuedTokens, policy_kwargs={"target_tokens": scale.target_queued_tokens}
    )
    autoscaling = AutoscalingConfig(
        min_replicas=scale.num_replicas, max_replicas=scale.max_replicas, policy=policy
    )
    return {"autoscaling_config": autoscaling}


class Ingress:
    """The HTTP side: all of `shopr1 serve` but the engine.

    Args:
        engines: Ray's handle.
        journal: another one.
        settings: as `Settings.model_dump` gives them.
    """

    def __init__(self, engines: Any, journal: Any, settings: Mapping[str, Any]) -> None:  # noqa: ANN401
        self._engines = engines
        self._journal = journal
        self._settings = Settings(**settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray, in the replica: an application cannot be sent to it."""
        app = create_app(self._settings, self._open_engines)
        app.add_middleware(_OneRequestId)
        return app

    async def _open_engines(self, _settings: Settings, metrics: Metrics, _on_fatal: OnFatal) -> RemoteEngines:
        """Returns when there is an engine."""
        description: Description = await self._engines.describe.remote()
        view: View | None = None
        while view is None:
            view = await self._journal.view.remote()
        engines = RemoteEngines(self._engines, self._journal, description, view, metrics)
        engines.watch()
        return engines


class _OneRequestId:
    """ASGI middleware: Ray's proxy names the request in the answer, too, with the same id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(raw=message["headers"])[REQUEST_ID_HEADER]
            await send(message)

        await self._app(scope, receive, send_without)
