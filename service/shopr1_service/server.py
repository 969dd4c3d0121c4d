"""Running the application under uvicorn."""

import logging
import resource
import signal

import uvicorn

from shopr1_service.app import create_app
from shopr1_service.loading import load_policy
from shopr1_service.settings import Settings

logger = logging.getLogger(__name__)

_SOCKET_BACKLOG = 4096
"""Trainers open a connection for each rollout of a batch, all at once."""


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT.

    Returns:
        The exit code: 0, or 1 if the policy cannot be loaded or its device fails for good.
    """
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logger.info("settings: %s", settings.model_dump_json())
    _allow_many_connections()
    failures: list[BaseException] = []

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(settings, lambda: load_policy(settings), on_failure=stop)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_level=settings.log_level,
            access_log=settings.log_level == "debug",  # metrics count requests; a scraper would fill the log
            backlog=_SOCKET_BACKLOG,
            timeout_graceful_shutdown=settings.shutdown_grace_s,
        )
    )
    # uvicorn raises the signal that stopped it once more when it is done; a clean end is exit code 0.
    signal.signal(signal.SIGTERM, lambda _signal, _frame: None)
    server.run()
    return 1 if failures else 0


def _allow_many_connections() -> None:
    """As many open files as the system lets this process have: shells often give it 1,024 to begin with."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    logger.info("open files, and with them connections: at most %d", hard)
