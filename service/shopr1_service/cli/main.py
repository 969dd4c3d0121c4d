"""The `shopr1` command.

Typer, not pydantic-settings' CLI: that would cover `serve` only, and put the help of 45 settings into it.
"""

import asyncio
import contextlib
import os
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shopr1_client import Client, ShopR1Error
from shopr1_rewards import RecipeError, load_recipe
from shopr1_service.cli.score_file import (
    InputLine,
    ScoreCall,
    ScoredLine,
    read_input,
    read_output,
    score_lines,
)
from shopr1_service.cli.summary_table import summary
from shopr1_service.errors import RolloutFileError, ServiceError, SettingsError
from shopr1_service.settings import Settings, load_settings

app = typer.Typer(
    help="The Shop-R1 reward service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipe_app = typer.Typer(help="Show and check recipes.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")

_errors = Console(stderr=True)

PolicyOption = Annotated[
    str | None,
    typer.Option(
        "--policy", metavar="DIR|HUB_ID|FILE.gguf", help="Default: the embedded SmolLM2-135M-Instruct."
    ),
]
RecipeOption = Annotated[str | None, typer.Option("--recipe", metavar="NAME|FILE", help="Default: shop_r1.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, such as max_groups=64. Repeatable."),
]


def main() -> None:
    """Entry point: one line for an expected error, and exit code 2."""
    try:
        app()
    except (ServiceError, RecipeError, ShopR1Error) as error:
        _errors.print("[bold red]error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(2)


@app.command()
def serve(
    policy: PolicyOption = None,
    recipe: RecipeOption = None,
    host: Annotated[str | None, typer.Option(help="Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Default: 8000.")] = None,
    config: ConfigOption = None,
    options: SetOption = None,
) -> None:
    """Serve rewards over HTTP until SIGTERM."""
    settings = _settings(config, options, policy=policy, recipe=recipe, host=host, port=port)
    _disable_progress_bars()
    from shopr1_service.server.uvicorn_server import serve as run  # imports torch

    code = run(settings)
    if any(thread.daemon for thread in threading.enumerate()):
        # An abandoned load or forward pass. It cannot be stopped, and an interpreter that exits while a
        # thread is inside torch is aborted.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)


@app.command()
def score(
    rollouts: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSONL, one group per line.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="JSONL of rewards; resumed if it exists. Default: standard output."
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(help="A running server. Default: score in this process.")] = None,
    policy: PolicyOption = None,
    recipe: RecipeOption = None,
    config: ConfigOption = None,
    options: SetOption = None,
) -> None:
    """Score a file of rollouts, offline or with a running server."""
    lines = read_input(rollouts)
    done = read_output(output, lines) if output else []
    with _score_call(url, config, options, policy, recipe) as call, _open(output) as sink:
        recipe_name = recipe if url else None
        former = done[-1] if done else None
        fresh = score_lines(lines[len(done) :], call, recipe_name, sink, former)
        scored = [*done, *_with_progress(fresh, len(lines), len(done))]
    _print_summary(lines, scored)


@recipe_app.command()
def show(name: Annotated[str, typer.Argument(help="Name or TOML file.")] = "shop_r1") -> None:
    """Print a recipe with all its numbers, defaults filled in, as JSON."""
    recipe = load_recipe(name)
    content = {"digest": recipe.digest, **recipe.model_dump(mode="json")}
    typer.echo(orjson.dumps(content, option=orjson.OPT_INDENT_2))


@recipe_app.command()
def check(file: Annotated[str, typer.Argument(help="Name or TOML file.")]) -> None:
    """Check a recipe; exit code 2 and the offending key if it is not valid."""
    recipe = load_recipe(file)
    typer.echo(f"{recipe.name} is valid: {recipe.digest}")


@app.command()
def openapi() -> None:
    """Print the OpenAPI document."""
    from shopr1_service.http.openapi import to_yaml
    from shopr1_service.policy.fake import FakePolicy
    from shopr1_service.scheduling.local_engine import LocalEngine
    from shopr1_service.server.app import create_app

    typer.echo(to_yaml(create_app(load_settings(), LocalEngine.opener(FakePolicy)).openapi()), nl=False)


def _settings(config: Path | None, options: Sequence[str] | None, **named: Any) -> Settings:  # noqa: ANN401
    given = {name: value for name, value in named.items() if value is not None}
    for option in options or ():
        name, separator, value = option.partition("=")
        if not separator:
            raise SettingsError(f"--set {option!r}: must be KEY=VALUE")
        given[name] = value
    return load_settings(given, config)


def _disable_progress_bars() -> None:
    """Keep transformers' progress bars out of logs; tqdm reads the variable when it is imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextlib.contextmanager
def _score_call(
    url: str | None,
    config: Path | None,
    options: Sequence[str] | None,
    policy: str | None,
    recipe: str | None,
) -> Iterator[ScoreCall]:
    """A function that scores a request with a running server, or with an engine in this process."""
    if url is not None:
        with Client(url) as client:
            # A wrong URL fails at once; a server that goes away later is waited for.
            client.wait_until_ready(timeout_s=0)
            yield client.score
        return
    _disable_progress_bars()
    from shopr1_service.core import Origin
    from shopr1_service.monitoring.metrics import Metrics
    from shopr1_service.policy.loading import load_policy  # imports torch
    from shopr1_service.scheduling.local_engine import LocalEngine
    from shopr1_service.scoring.recipe_book import RecipeBook
    from shopr1_service.scoring.scorer import Scorer

    settings = _settings(config, options, policy=policy, recipe=recipe)
    recipes = RecipeBook(settings.recipe)
    with _errors.status("Loading the policy …"):
        metrics = Metrics()
        scorer = Scorer(LocalEngine(load_policy(settings), settings, metrics), recipes, settings, metrics)
    with asyncio.Runner() as runner, contextlib.closing(scorer):
        yield lambda request: runner.run(scorer.score(request, Origin(uuid.uuid4().hex)))


def _open(output: Path | None) -> contextlib.AbstractContextManager[TextIO]:
    if output is None:
        return contextlib.nullcontext(sys.stdout)
    try:
        return output.open("a", encoding="utf-8")
    except OSError as error:
        raise RolloutFileError(f"{output}: {error.strerror}") from error


def _with_progress(scored: Iterator[ScoredLine], num_lines: int, num_done: int) -> Iterator[ScoredLine]:
    """Show a progress bar. Not rich's `track`: in the end it forgets what was completed before it began."""
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_errors) as progress:
        task = progress.add_task("scoring", total=num_lines, completed=num_done)
        for line in scored:
            yield line
            progress.advance(task)


def _print_summary(lines: Sequence[InputLine], scored: Sequence[ScoredLine]) -> None:
    groups = [line.group for line in lines]
    _errors.print(summary(groups, [line.group.rewards for line in scored]))
