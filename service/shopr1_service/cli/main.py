"""The `shopr1` command.

Typer, not pydantic-settings' CLI: that would cover `serve` only, and put the help of 45 settings into it.

Nothing is imported before a command needs it: help and errors of usage come at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="The Shop-R1 reward service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipe_app = typer.Typer(help="Show and check recipes.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")

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
    except Exception as error:
        if not _is_expected(error):
            raise
        _print_error(str(error))
        sys.exit(2)


@app.command()
def serve(
    policy: PolicyOption = None,
    recipe: RecipeOption = None,
    host: Annotated[str | None, typer.Option(help="Default: 127.0.0.1.")] = None,
    port: Annotated[str | None, typer.Option(metavar="INTEGER", help="Default: 8000.")] = None,
    config: ConfigOption = None,
    options: SetOption = None,
) -> None:
    """Serve rewards over HTTP until SIGTERM."""
    from shopr1_service.cli.serve_command import serve_until_a_signal

    given = _given(options, policy=policy, recipe=recipe, host=host, port=port)
    raise typer.Exit(serve_until_a_signal(given, config))


@app.command()
def score(
    rollouts: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="JSONL, one group per line.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            dir_okay=False,
            help="JSONL of rewards; resumed if it exists. Default: standard output.",
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(help="A running server. Default: score in this process.")] = None,
    policy: PolicyOption = None,
    recipe: RecipeOption = None,
    config: ConfigOption = None,
    options: SetOption = None,
) -> None:
    """Score a file of rollouts, offline or with a running server."""
    from shopr1_service.cli.score_command import in_this_process, score_to_file, with_server

    if url is not None:
        _refuse_with_url(policy=policy, config=config, set=options)
        score_to_file(rollouts, output, with_server(url), recipe)
    else:
        given = _given(options, policy=policy, recipe=recipe)
        score_to_file(rollouts, output, in_this_process(given, config))


@recipe_app.command()
def show(name: Annotated[str, typer.Argument(help="Name or TOML file.")] = "shop_r1") -> None:
    """Print a recipe with all its numbers, defaults filled in, as JSON."""
    import orjson

    from shopr1_rewards import load_recipe

    recipe = load_recipe(name)
    content = {"digest": recipe.digest, **recipe.model_dump(mode="json")}
    typer.echo(orjson.dumps(content, option=orjson.OPT_INDENT_2))


@recipe_app.command()
def check(file: Annotated[str, typer.Argument(help="Name or TOML file.")]) -> None:
    """Check a recipe; exit code 2 and the offending key if it is not valid."""
    from shopr1_rewards import load_recipe

    recipe = load_recipe(file)
    typer.echo(f"{recipe.name} is valid: {recipe.digest}")


@app.command()
def openapi() -> None:
    """Print the OpenAPI document."""
    from shopr1_service.http.openapi import to_yaml
    from shopr1_service.policy.fake import FakePolicy
    from shopr1_service.scheduling.local_engine import LocalEngine
    from shopr1_service.server.app import create_app
    from shopr1_service.settings import load_settings

    typer.echo(to_yaml(create_app(load_settings(), LocalEngine.opener(FakePolicy)).openapi()), nl=False)


def _given(options: Sequence[str] | None, **named: str | None) -> dict[str, Any]:
    """The settings of the command line by name."""
    from shopr1_service.errors import SettingsError

    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    for option in options or ():
        name, separator, value = option.partition("=")
        if not separator:
            raise SettingsError(f"--set {option!r}: must be KEY=VALUE")
        if name in given:
            raise SettingsError(f"--set {option!r}: {name} is given twice")
        given[name] = value
    return given


def _refuse_with_url(**named: object) -> None:
    """Refuse options that would have no effect: the server has a policy and settings of its own."""
    for name, value in named.items():
        if value:
            raise typer.BadParameter(
                "cannot be used with --url: the server has its own", param_hint=f"--{name}"
            )


def _is_expected(error: Exception) -> bool:
    from shopr1_client.errors import ShopR1Error
    from shopr1_rewards.errors import RecipeError
    from shopr1_service.errors import ServiceError

    return isinstance(error, ServiceError | RecipeError | ShopR1Error)


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True).print("[bold red]error:[/]", escape(message), highlight=False, soft_wrap=True)
