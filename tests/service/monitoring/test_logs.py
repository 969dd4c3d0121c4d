"""Log lines: their format, the request that they name, and the secrets that none contains."""

import asyncio
import io
import json
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from transformers.utils import logging as transformers_logging

from shopr1_client import Client
from shopr1_client.errors import InvalidRequestError
from shopr1_client.wire import Group
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Certainty, TokenGroup, Tokens, Unmeasurable, Version
from shopr1_service.monitoring.logs import JsonFormatter, TextFormatter, logging_to_stderr
from shopr1_service.policy.fake import CharacterCodec, FakePolicy
from shopr1_service.server import uvicorn_server as server
from shopr1_service.settings import LogFormat, Settings
from tests.support.http import WAIT_S, answer, free_port, group, post, running
from tests.support.log_lines import noting
from tests.support.trainer_requests import SLIME

pytestmark = pytest.mark.anyio

MARK = "unmistakable"
KEY = f"{MARK}-0123456789"
FORGED = '\n{"level": "critical", "message": "forged"}\r\x85\u2028\x1b[31m'
NOT_SHOWN = "(not shown: it may quote a request)"


def record(message: str, *args: object, error: BaseException | None = None, **extra: object) -> Any:
    """A warning of `some.module`, one microsecond after the beginning of 1970."""
    exc_info = (type(error), error, error.__traceback__) if error else None
    made = logging.LogRecord("some.module", logging.WARNING, "file.py", 1, message, args, exc_info)
    made.created = 0.000001
    vars(made).update(extra)
    return made


def as_json(made: logging.LogRecord) -> Any:
    line = JsonFormatter().format(made)
    assert line.isascii()
    assert line.splitlines() == [line]
    return json.loads(line, parse_constant=pytest.fail)  # NaN is not JSON


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    """The error with a traceback."""
    try:
        raise error from cause
    except Exception as caught:
        return caught


# --- lines ------------------------------------------------------------------------------------------


def test_fields_of_a_line() -> None:
    assert as_json(record("%d of %s", 3, "four", num_tokens=5, ratio=0.5, is_new=True)) == {
        "time": "1970-01-01T00:00:00.000001Z",
        "level": "warning",
        "logger": "some.module",
        "message": "3 of four",
        "num_tokens": 5,
        "ratio": 0.5,
        "is_new": True,
    }


def test_the_same_as_text() -> None:
    line = TextFormatter().format(record("%d of %s", 3, "four", num_tokens=5))
    assert line == "1970-01-01T00:00:00.000001Z WARNING some.module: 3 of four num_tokens=5"


def test_an_exception_has_type_message_and_stack() -> None:
    error = raised(RuntimeError("the last"), raised(ValueError("the first")))
    line = as_json(record("failed", error=error))["exception"]
    assert (line["type"], line["message"]) == ("RuntimeError", "the last")
    assert re.search(r"ValueError: the first\n.*in raised\n.*RuntimeError: the last\n$", line["stack"], re.S)


def test_all_exceptions_of_a_group_are_logged() -> None:
    error = raised(ExceptionGroup("two", [ValueError("one"), raised(TypeError("other"))]))
    stack = as_json(record("failed", error=error))["exception"]["stack"]
    assert [part in stack for part in ("ValueError: one\n", "TypeError: other\n")] == [True, True]


def test_exceptions_in_a_circle_end() -> None:
    one, other = raised(ValueError("one")), raised(ValueError("other"))
    one.__cause__, other.__cause__ = other, one
    stack = as_json(record("failed", error=one))["exception"]["stack"]
    assert stack.count("ValueError: o") == 2


def test_values_that_json_cannot_express() -> None:
    line = as_json(
        record(
            "half \ud800", text="\udfff", number=float("nan"), thing={"a": {1}, "b": [2, None]}, level="mine"
        )
    )
    assert line["message"] == "half \\ud800"
    assert line["text"] == "\\udfff"
    assert line["number"] == "nan"
    assert line["thing"] == {"a": "{1}", "b": [2, None]}
    assert line["level"] == "warning"


def test_a_librarys_mistake_is_a_line_all_the_same() -> None:
    assert as_json(record("%d apples", "four"))["message"] == "%d apples (its arguments do not fit)"


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def test_an_exception_that_cannot_be_shown_is_a_line_all_the_same() -> None:
    line = as_json(record("failed", error=raised(UnprintableError())))
    assert line["exception"]["message"] == "(cannot be shown: RuntimeError)"


# --- forgery ----------------------------------------------------------------------------------------


def forged_records() -> list[logging.LogRecord]:
    error = raised(RuntimeError(FORGED), raised(ValueError(FORGED)))
    return [record(FORGED), record("%s", FORGED), record("x", field=FORGED), record("x", error=error)]


@pytest.mark.parametrize("made", forged_records())
def test_no_json_line_can_be_forged(made: logging.LogRecord) -> None:
    assert as_json(made)["level"] == "warning"


@pytest.mark.parametrize("made", forged_records())
def test_no_text_line_can_be_forged(made: logging.LogRecord) -> None:
    text = TextFormatter().format(made)
    first, *others = text.splitlines()
    assert first.startswith("1970-01-01T00:00:00.000001Z WARNING some.module: ")
    assert all(line.startswith("    ") for line in others)
    assert "\x1b" not in text


# --- quoted requests --------------------------------------------------------------------------------


def invalid_group() -> Exception:
    with pytest.raises(ValidationError, match=MARK) as caught:
        Group.model_validate({"prompt": MARK, "ground_truth": {}, "completions": [{MARK: MARK}]})
    return caught.value


@pytest.mark.parametrize(
    "error",
    [invalid_group(), InvalidRequestError(MARK), KeyError(MARK)],
    ids=lambda error: type(error).__name__,
)
def test_exceptions_that_quote_are_logged_without_their_message(error: Exception) -> None:
    made = record("failed", error=raised(RuntimeError("a bug"), raised(error)))
    assert MARK not in json.dumps(as_json(made)) + TextFormatter().format(made)
    assert NOT_SHOWN in as_json(made)["exception"]["stack"]
    assert as_json(record("failed", error=error))["exception"]["message"] == NOT_SHOWN


def test_asyncios_complaints_do_not_quote() -> None:
    error = raised(InvalidRequestError(MARK))
    made = record("Task exception was never retrieved\nfuture: <Task %r>", error, error=error)
    made.name = "asyncio"
    line = as_json(made)
    assert line["message"] == "Task exception was never retrieved"
    assert MARK not in json.dumps(line)


# --- where lines come from --------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("log_format", "stream", "is_json"),
    [
        (LogFormat.AUTO, io.StringIO(), True),
        (LogFormat.AUTO, Terminal(), False),
        (LogFormat.TEXT, io.StringIO(), False),
        (LogFormat.JSON, Terminal(), True),
    ],
)
def test_a_terminal_gets_text(
    monkeypatch: pytest.MonkeyPatch, log_format: LogFormat, stream: io.StringIO, is_json: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    with logging_to_stderr(Settings(log_format=log_format)):
        logging.getLogger("some.module").info("here")
    assert stream.getvalue().startswith("{") == is_json


def test_libraries_use_the_same_format(capsys: pytest.CaptureFixture[str]) -> None:
    stubborn = logging.getLogger("stubborn")
    stubborn.addHandler(logging.StreamHandler(sys.stderr))
    stubborn.propagate = False
    with logging_to_stderr(Settings(log_format=LogFormat.JSON)), warnings.catch_warnings():
        warnings.simplefilter("always")
        stubborn.warning("mine")
        transformers_logging.get_logger("transformers.models").warning("of a model")
        warnings.warn("outdated", FutureWarning, stacklevel=1)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["logger"] for line in lines] == ["stubborn", "transformers.models", "py.warnings"]
    assert "FutureWarning: outdated" in lines[2]["message"]


class BrokenPipe(io.StringIO):
    def write(self, _text: str) -> int:
        raise BrokenPipeError


def test_a_broken_stream_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", BrokenPipe())
    with logging_to_stderr(Settings()):
        logging.getLogger("some.module").error("nobody hears")


# --- whose request ----------------------------------------------------------------------------------


class TalkingCodec(CharacterCodec):
    def encode_text(self, text: str) -> Tokens:
        logging.getLogger("talking").info("%s", text)
        return super().encode_text(text)


class Talking(FakePolicy):
    """Logs prompts where they are prepared, and that it scores."""

    def __init__(self) -> None:
        super().__init__()
        self.codec = TalkingCodec()

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        logging.getLogger("talking").info("scoring")
        return super().certainties(groups, rules, version)


async def test_prepare_threads_log_the_request_id() -> None:
    with noting("talking") as lines:
        async with running(Talking()) as client:
            await asyncio.gather(
                *(
                    post(
                        client,
                        {"groups": [group(answer(), prompt=f"p{i}")]},
                        **{"X-Request-ID": f"r{i}", "X-Run-ID": f"run{i}"},
                    )
                    for i in range(8)
                )
            )
            await post(client, {"groups": [group(answer(), prompt="p8")]}, **{"X-Request-ID": "r8"})
    whose = {
        line["message"]: (line["request_id"], line.get("run")) for line in lines if "p" in line["message"]
    }
    expected: dict[str, tuple[str, str | None]] = {f"p{i}": (f"r{i}", f"run{i}") for i in range(8)}
    assert {text: of for text, of in whose.items() if len(text) == 2} == expected | {"p8": ("r8", None)}
    # The engine's thread works for many at once.
    assert {line.get("request_id") for line in lines if line["message"] == "scoring"} == {None}


def test_text_lines_name_the_request_too() -> None:
    async def formatted() -> str:
        async with running(Talking()) as client:
            handler = logging.StreamHandler(stream := io.StringIO())
            handler.setFormatter(TextFormatter())
            logger = logging.getLogger("talking")
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            try:
                body = {"groups": [group(answer(), prompt="here")]}
                await post(client, body, **{"X-Request-ID": "r1", "X-Run-ID": "a"})
            finally:
                logger.removeHandler(handler)
            return stream.getvalue()

    assert re.search(r"^\S+ INFO talking \[r1 a\]: here$", asyncio.run(formatted()), re.M)


# --- a whole service --------------------------------------------------------------------------------


class BrokenCodec(CharacterCodec):
    """Fails on some prompts with an error that quotes what was sent."""

    def encode_text(self, text: str) -> Tokens:
        if text.startswith("bug"):
            Group.model_validate({"prompt": text})
        return super().encode_text(text)


class Broken(FakePolicy):
    """The engine fails too."""

    def __init__(self) -> None:
        super().__init__()
        self.codec = BrokenCodec()

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        if groups[0].prompt_ids[0] == ord("!"):
            raise RuntimeError("the engine fails")
        return super().certainties(groups, rules, version)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Lets a service run while something is done with its URL, and gives what it has logged."""
    # The client's own logs, in the same process, are not the service's.
    for name in ("httpx", "httpcore"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.WARNING)
    former = signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def run(policy: FakePolicy, work: Callable[[str], None], **settings: Any) -> list[Any]:
        monkeypatch.setattr(server, "load_policy", lambda _settings, _startup: policy)
        chosen = Settings(port=free_port(), log_format=LogFormat.JSON, **settings)
        with ThreadPoolExecutor() as pool:
            done = pool.submit(ask, f"http://127.0.0.1:{chosen.port}", work)
            assert server.serve(chosen) == 0
            done.result()
        return [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    yield run
    signal.signal(signal.SIGTERM, former)


def ask(url: str, work: Callable[[str], None]) -> None:
    try:
        with Client(url) as client:
            client.wait_until_ready(WAIT_S)
        work(url)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def test_every_line_of_a_service_is_json(serve: Any) -> None:
    lines = serve(FakePolicy(), lambda url: httpx.get(f"{url}/info?{MARK}=1"), access_log=True)
    messages = {line["logger"]: line["message"] for line in lines}
    assert messages["shopr1_service.access"] == "GET /info 200"
    assert messages["uvicorn.error"].startswith("Finished server process")
    # uvicorn's own would have the URL.
    assert "uvicorn.access" not in messages


def send_marks(url: str) -> None:
    """Good, bad and failing requests with the mark wherever a client can put something."""
    marked = group(answer({"type": "click", "name": MARK}, MARK), truth={"type": "click", "name": MARK})
    good = [
        {**marked, "prompt": MARK, "id": MARK},
        {**marked, "prompt": [{"role": MARK, "content": MARK}]},
        {**marked, "prompt": "ids", "completions": [{"text": MARK}, {"token_ids": list(map(ord, MARK))}]},
    ]
    bad = [
        {**marked, "ground_truth": {"type": MARK}},
        {**marked, "ground_truth": json.dumps({"type": "click", MARK: MARK})},
        {**marked, "ground_truth": {"type": "click", "name": {MARK: MARK}}},
        {**marked, MARK: MARK},
        {**marked, "prompt": {MARK: MARK}},
        {**marked, "prompt": [{"role": MARK, "content": {MARK: MARK}}]},
        {**marked, "completions": [{MARK: MARK}, {"token_ids": [MARK]}, {"token_ids": [2**40]}]},
        {**marked, "prompt": f"{MARK}\ud800"},
    ]
    failing = [{**marked, "prompt": f"bug {MARK}"}, {**marked, "prompt": f"! {MARK}"}]
    bodies = [json.dumps({"groups": [each]}) for each in (*good, *bad, *failing)]
    bodies += [json.dumps({"groups": good, **more}) for more in ({"recipe": MARK}, {"policy_version": MARK})]
    bodies += [f'{{"{MARK}": {MARK}', json.dumps(MARK), json.dumps({MARK: MARK})]
    # uvicorn closes a connection on which a request has failed.
    one_by_one = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=url, timeout=WAIT_S, limits=one_by_one) as client:
        for body in bodies:
            client.post("/score", content=body, headers=headers(Authorization=f"Bearer {KEY}"))
        good_body = json.dumps({"groups": good})
        for path in (
            f"/key/{KEY}/score",
            f"/score?api_key={KEY}",
            f"/key/{KEY}x/score",
            f"/key/{KEY}",
            f"/{MARK}",
        ):
            client.post(path, content=good_body, headers=headers())
        client.post("/score", content=good_body, headers=headers(Authorization=f"Bearer {KEY}-wrong"))
        for path in (SLIME, "/labels"):
            client.request("PUT", path, content=good_body, headers=headers(Authorization=f"Bearer {KEY}"))
        client.request(MARK, "/score", headers=headers(Authorization=f"Bearer {KEY}"))


def headers(**more: str) -> dict[str, str]:
    """With a mark in each, except the ids of request and run, which are there to be logged."""
    given = {
        "Content-Type": "application/json",
        "User-Agent": MARK,
        "Cookie": MARK,
        "X-Request-Timeout": "60",
    }
    return {**given, **more}


def test_no_text_of_a_request_and_no_key_is_logged_at_any_level(serve: Any) -> None:
    lines = serve(Broken(), send_marks, log_level="debug", api_keys=(KEY,), access_log=True)
    assert [line for line in lines if MARK in json.dumps(line)] == []
    access = [line["status"] for line in lines if line.get("route") == "/score"]
    # Three good ones, eight bad, two that fail, a recipe and a version that are not there, three broken
    # bodies, two with the key in the URL, and one without a method. Those without a key have no route yet.
    assert access == [200] * 3 + [422] * 8 + [500] * 2 + [422, 409] + [400, 422, 422] + [200, 200, 405]
    failures = [line["exception"]["type"] for line in lines if "exception" in line]
    assert "pydantic_core._pydantic_core.ValidationError" in failures
    assert "RuntimeError" in failures
