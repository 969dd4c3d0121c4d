"""Paths of the settings, tried before anything is loaded: an update hours later must not find a wrong one.

Key file, recipe, rollout log and TLS files are not here: they are opened at start anyway.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from shopr1_service.errors import SettingsError
from shopr1_service.policy.prompts.chat import read_templates
from shopr1_service.settings import Settings

logger = logging.getLogger(__name__)


def check_paths(settings: Settings) -> None:
    """Try to write, list and read what the service will write, list and read.

    Raises:
        SettingsError: names each setting with its path and the system's reason.
    """
    flaws = list(_flaws(settings))
    if flaws:
        raise SettingsError("; ".join(flaws))
    read_templates(settings.chat_templates)
    if settings.staging_dir is None and (flaw := _flaw(tempfile.gettempdir)):
        logger.warning("updates will fail: staging_dir is not set, and %s", flaw)


def _flaws(settings: Settings) -> Iterator[str]:
    staging, cache = settings.staging_dir, settings.cache_dir
    if staging is not None and (flaw := _flaw(partial(_write_into, staging))):
        yield f"staging_dir: cannot write into {str(staging)!r}: {flaw}"
    for root in settings.policy_roots:
        if flaw := _flaw(partial(_list, root)):
            yield f"policy_roots: cannot list {str(root)!r}: {flaw}"
    if cache is not None and (flaw := _flaw(partial(_make_and_write, cache))):
        yield f"cache_dir: cannot write into {str(cache)!r}: {flaw}"


def _flaw(attempt: Callable[[], object]) -> str | None:
    """Why an attempt fails; None: it does not."""
    try:
        attempt()
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # no path at all, such as one with a zero byte
        return str(error)
    return None


def _list(directory: Path) -> None:
    os.scandir(directory).close()


def _write_into(directory: Path) -> None:
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        file.write(b"\0")


def _make_and_write(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    _write_into(directory)
