"""The `shopr1` command, also as `python -m shopr1_service`."""

import sys


def main() -> None:
    """Run the command line, or say what to install where a trainer's bare install has no service."""
    try:
        from shopr1_service.cli.main import main as run
    except ModuleNotFoundError as error:
        sys.exit(
            f"shopr1 needs the service's packages ({error.name} is missing): pip install 'shopr1[service]'"
        )
    run()


if __name__ == "__main__":
    main()
