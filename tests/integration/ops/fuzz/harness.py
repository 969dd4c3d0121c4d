"""The fuzz loop of all targets."""

import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import atheris

MAX_BYTES = 4096


def fuzz(check: Callable[[bytes], object], seeds: Iterable[bytes]) -> None:
    """Call `check` with mutated seeds until it raises or the limits of the command line are reached.

    The arguments are libFuzzer's: `-runs=1000`, `-max_total_time=60`, or files to run again.
    """
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds):
            (Path(corpus) / str(number)).write_bytes(seed)
        again = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
        options = [f"-max_len={MAX_BYTES}", f"-artifact_prefix={tempfile.gettempdir()}/"]
        arguments = [sys.argv[0], *options, *sys.argv[1:], *([] if again else [corpus])]
        atheris.Setup(arguments, check)
        atheris.Fuzz()
