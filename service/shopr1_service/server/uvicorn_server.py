"""Run the application under uvicorn: TLS, limit of open files, graceful shutdown."""

import asyncio
import ipaddress
import logging
import resource
import signal
import socket

import uvicorn

from shopr1_service.errors import SettingsError
from shopr1_service.http.state import State
from shopr1_service.monitoring.logs import logging_to_stderr
from shopr1_service.policy.load_progress import LoadProgress
from shopr1_service.policy.loading import load_policy
from shopr1_service.server.app import create_app
from shopr1_service.server.http_protocol import connection_class
from shopr1_service.server.listeners import listening, url
from shopr1_service.server.path_checks import check_paths
from shopr1_service.server.tls import tls_options
from shopr1_service.settings import Settings
from shopr1_service.updates.updatable_engine import UpdatableEngine

logger = logging.getLogger(__name__)

_SOCKET_BACKLOG = 4096
"""Trainers open a connection for each rollout of a batch, all at once."""
_KEEP_ALIVE_S = 75
"""Idle connections stay open for longer than clients reuse them (httpx 5 s, aiohttp 15 s): with uvicorn's own
5 s, a request that meets the closing of its connection is lost, and neither client sends a POST again."""
_ANSWER_S = 2.0
"""Seconds before the end of the grace time at which open requests are answered with 503."""


class _Server(uvicorn.Server):
    """Server that ends in order: accepts no more, finishes what is running, and answers the rest in time."""

    def __init__(self, config: uvicorn.Config, state: State, grace_s: float) -> None:
        super().__init__(config)
        self._state = state
        self._grace_s = grace_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():  # uvicorn names only sockets of its own
            logger.info("running on %s", url(listener, self.config.host, is_tls=self.config.is_ssl))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._state.drain()
        finish_s = self._grace_s - min(_ANSWER_S, self._grace_s / 4)
        asyncio.get_running_loop().call_later(finish_s, self._state.shutdown.set)
        await super().shutdown(sockets)


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT.

    Returns:
        The exit code: 0, or 1 if the policy cannot be loaded or its engine fails or hangs for good.

    Raises:
        SettingsError: the service would be open to strangers, a path of the settings cannot be used, or the
            port is in use.
    """
    check_exposure(settings)
    with logging_to_stderr(settings):
        check_paths(settings)
        with listening(settings.host, settings.port, _SOCKET_BACKLOG) as sockets:
            return _serve(settings, sockets)


def _serve(settings: Settings, sockets: list[socket.socket]) -> int:
    logger.info("settings", extra={"settings": settings.model_dump(mode="json")})
    _allow_many_connections()
    failures: list[BaseException] = []

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    startup = LoadProgress()
    open_engine = UpdatableEngine.opener(lambda: load_policy(settings, startup))
    app = create_app(settings, open_engine, on_failure=stop, startup=startup)
    server = _Server(
        uvicorn.Config(
            app,
            http=connection_class(settings.receive_timeout_s),
            ws="none",
            host=settings.host,
            port=settings.port,
            log_level=settings.log_level,
            log_config=None,  # its lines are handled like all others
            # uvicorn's access log holds URLs with keys; `http/middleware/request_recorder.py` writes ours
            access_log=False,
            backlog=_SOCKET_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=settings.shutdown_grace_s,
            **tls_options(settings),
        ),
        app.state.shopr1,
        settings.shutdown_grace_s,
    )
    # uvicorn raises the signal that stopped it again when it is done; a clean end is exit code 0.
    signal.signal(signal.SIGTERM, lambda _signal, _frame: None)
    server.run(sockets)
    return 1 if failures else 0


def check_exposure(settings: Settings) -> None:
    """Raise a `SettingsError` if strangers could reach the service without a key."""
    has_keys = settings.api_keys or settings.api_key_file
    if not (has_keys or settings.allow_unauthenticated or _is_loopback(settings.host)):
        raise SettingsError(
            f"host {settings.host!r} can be reached by others, and there are no API keys; set api_keys or "
            "api_key_file, or allow_unauthenticated = true where the network keeps strangers out"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _allow_many_connections() -> None:
    """Raise the limit of open files to the most that the system allows; shells often start with 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    logger.info("at most %d open files, and with them connections", hard)
