"""`shopr1 score`: from a file of rollouts to a file of rewards, with a progress bar and a summary."""

import asyncio
import contextlib
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shopr1_client import Client
from shopr1_service.cli.score_file import (
    ScoreCall,
    ScoredLine,
    naming,
    read_input,
    read_output,
    refuse_if_same,
    score_lines,
)
from shopr1_service.cli.serve_command import disable_progress_bars
from shopr1_service.cli.summary_table import summary
from shopr1_service.settings import load_settings

_errors = Console(stderr=True)

Scoring = contextlib.AbstractContextManager[ScoreCall]


def score_to_file(rollouts: Path, output: Path | None, scoring: Scoring, recipe: str | None = None) -> None:
    """Score all lines that are not in the output yet.

    Args:
        recipe: name of one of the server's recipes; None: the default.

    Raises:
        RolloutFileError: input or output cannot be read or written, or a line is malformed.
    """
    refuse_if_same(rollouts, output)
    lines = read_input(rollouts)
    done = read_output(output, lines) if output else []
    former = done[-1] if done else None
    with scoring as call, _open(output) as sink:
        fresh = score_lines(lines[len(done) :], call, recipe, sink, former)
        scored = [*done, *_with_progress(fresh, len(lines), len(done))]
    groups = [line.group for line in lines]
    _errors.print(summary(groups, [line.group.rewards for line in scored]))


@contextlib.contextmanager
def with_server(url: str) -> Iterator[ScoreCall]:
    """A function that scores a request with a running server."""
    with Client(url) as client:
        # A wrong URL fails at once; a server that goes away later is waited for.
        client.wait_until_ready(timeout_s=0)
        yield client.score


@contextlib.contextmanager
def in_this_process(options: Mapping[str, Any], config: Path | None) -> Iterator[ScoreCall]:
    """A function that scores a request with an engine in this process."""
    settings = load_settings(options, config)
    disable_progress_bars()
    from shopr1_service.core import Origin
    from shopr1_service.monitoring.metrics import Metrics
    from shopr1_service.policy.loading import load_policy  # imports torch
    from shopr1_service.scheduling.local_engine import LocalEngine
    from shopr1_service.scoring.recipe_book import RecipeBook
    from shopr1_service.scoring.scorer import Scorer

    recipes = RecipeBook(settings.recipe)
    with _errors.status("Loading the policy …"):
        metrics = Metrics()
        scorer = Scorer(LocalEngine(load_policy(settings), settings, metrics), recipes, settings, metrics)
    with asyncio.Runner() as runner, contextlib.closing(scorer):
        yield lambda request: runner.run(scorer.score(request, Origin(uuid.uuid4().hex)))


@contextlib.contextmanager
def _open(output: Path | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    with naming(output):
        sink = output.open("a", encoding="utf-8")
    try:
        yield sink
    finally:
        with naming(output):
            sink.close()


def _with_progress(scored: Iterator[ScoredLine], num_lines: int, num_done: int) -> Iterator[ScoredLine]:
    """Show a progress bar. Not rich's `track`: in the end it forgets what was completed before it began."""
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_errors) as progress:
        task = progress.add_task("scoring", total=num_lines, completed=num_done)
        for line in scored:
            yield line
            progress.advance(task)
