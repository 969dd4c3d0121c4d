"""Fixtures of the command line."""

import sys
from collections.abc import Iterator

import pytest

from shopr1_service.cli import main as cli
from shopr1_service.policy.fake import FakePolicy
from tests.support.command_line import Ended, Run
from tests.support.http import served


@pytest.fixture
def shopr1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `shopr1` in this process."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["shopr1", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        assert isinstance(code, int)
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(FakePolicy(26.0, max_sequence_tokens=500)) as address:
        yield address
