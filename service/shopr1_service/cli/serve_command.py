"""`shopr1 serve`: the exit code, and the error that ends a start as a line of the log."""

import gc
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shopr1_client.errors import ShopR1Error
from shopr1_rewards.errors import RecipeError
from shopr1_service.errors import ServiceError
from shopr1_service.settings import Settings, load_settings, wanted_log_format

WRONG_SETTING = 2
"""Exit code where a restart does not help."""
BUG = 1


def serve_until_a_signal(options: Mapping[str, Any], config: Path | None) -> int:
    """Serve until SIGTERM or SIGINT.

    Returns:
        The exit code: 0; 1 if the policy cannot be loaded or its engine fails; where the log is JSON, 2 for a
        wrong setting, a port in use, or a file that cannot be used.

    Raises:
        ServiceError, RecipeError, ShopR1Error: those of exit code 2, where the log is text.
    """
    try:
        return _serve(options, config)
    except Exception as error:
        from shopr1_service.monitoring.logs import write_as_json, writes_json  # imports FastAPI

        if not writes_json(wanted_log_format(options, config)):
            raise
        is_expected = isinstance(error, ServiceError | RecipeError | ShopR1Error)
        write_as_json(str(error) if is_expected else "the service ends", None if is_expected else error)
        return WRONG_SETTING if is_expected else BUG


def _serve(options: Mapping[str, Any], config: Path | None) -> int:
    settings = load_settings(options, config)
    disable_progress_bars()
    code = _imported_server()(settings)
    if any(thread.daemon for thread in threading.enumerate()):
        # An abandoned load or forward pass. It cannot be stopped, and an interpreter that exits while a
        # thread is inside torch is aborted.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _imported_server() -> Callable[[Settings], int]:
    """Import the server, and torch with it, without the collector, which would take a sixth of the time.

    Imports leave no garbage behind. Later collections skip all that they have made.
    """
    gc.disable()
    try:
        from shopr1_service.server.uvicorn_server import serve
    finally:
        gc.enable()
    gc.freeze()
    return serve


def disable_progress_bars() -> None:
    """Keep transformers' progress bars out of logs; tqdm reads the variable when it is imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
