"""Run the application under uvicorn: TLS, limit of open files, graceful shutdown."""

import asyncio
import errno
import functools
import ipaddress
import logging
import resource
import signal
import socket
from typing import Any

import uvicorn

from shopr1_service.errors import SettingsError
from shopr1_service.http.state import State
from shopr1_service.monitoring.logs import logging_to_stderr
from shopr1_service.policy.load_progress import LoadProgress
from shopr1_service.policy.loading import load_policy
from shopr1_service.server.app import create_app
from shopr1_service.server.http_protocol import Connection, connection_class
from shopr1_service.server.listeners import listening, url
from shopr1_service.server.path_checks import check_paths
from shopr1_service.server.tls import tls_options
from shopr1_service.settings import Settings
from shopr1_service.updates.updatable_engine import UpdatableEngine

logger = logging.getLogger(__name__)

_SOCKET_BACKLOG = 4096
"""Trainers open a connection for each rollout of a batch, all at once."""
_ACCEPTS_PER_TURN = 32
"""Connections that the event loop accepts before it serves others. If it runs out of descriptors, it fails so
many times a second."""
_KEEP_ALIVE_S = 620
"""Idle connections stay open for longer than clients reuse them (httpx 5 s, aiohttp 15 s, Go and hyper 90 s,
load balancers up to 600 s): with uvicorn's own 5 s, a request that meets the closing of its connection is
lost, and most clients do not send a POST again. Where descriptors run short, they are closed earlier."""
_HANDSHAKE_S = 10.0
"""Seconds for the handshake of TLS. Before its end a connection cannot be closed to make room."""
_ANSWER_S = 2.0
"""Seconds before the end of the grace time at which scoring requests are answered with 503; others half of it
later."""
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class _Server(uvicorn.Server):
    """Server that ends in order: accepts no more, finishes what is running, and answers the rest in time."""

    def __init__(
        self, config: uvicorn.Config, state: State, grace_s: float, connection: type[Connection]
    ) -> None:
        super().__init__(config)
        self._state = state
        self._grace_s = grace_s
        self._connection = connection

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_loop_error)
        if self.config.is_ssl:  # uvicorn has no option for it
            create = functools.partial(loop.create_server, ssl_handshake_timeout=_HANDSHAKE_S)
            loop.create_server = create  # type: ignore[method-assign]
        await super().startup(sockets)
        # asyncio accepts as many connections per turn as the system may queue: the queue is set here.
        for listener in [listener for server in self.servers for listener in server.sockets]:
            with socket.fromfd(listener.fileno(), listener.family, listener.type) as shared:
                shared.listen(_SOCKET_BACKLOG)
        for listener in sockets or ():  # uvicorn names only sockets of its own
            logger.info(
                "running on %s (Press CTRL+C to quit)",
                url(listener, self.config.host, is_tls=self.config.is_ssl),
            )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._state.drain()
        loop, answer_s = asyncio.get_running_loop(), min(_ANSWER_S, self._grace_s / 4)
        loop.call_later(self._grace_s - answer_s, self._state.shutdown.set)
        loop.call_later(self._grace_s - answer_s / 2, self._state.open_requests.interrupt)
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):  # beyond the grace time
            connection.transport.abort()

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _NO_ROOM and "socket" in context:
            # The loop accepts no more for a second.
            self._connection.open_connections.close_idle(str(error))
        else:
            loop.default_exception_handler(context)


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
    connection = connection_class(settings.receive_timeout_s)  # after the limit of open files has been raised
    server = _Server(
        uvicorn.Config(
            app,
            http=connection,
            ws="none",
            host=settings.host,
            port=settings.port,
            log_level=settings.log_level,
            log_config=None,  # its lines are handled like all others
            # uvicorn's access log holds URLs with keys; `http/middleware/request_recorder.py` writes ours
            access_log=False,
            backlog=_ACCEPTS_PER_TURN,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=settings.shutdown_grace_s,
            **tls_options(settings),
        ),
        app.state.shopr1,
        settings.shutdown_grace_s,
        connection,
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
