"""Synthetic trainings and failing services fire their alerts on a real Prometheus, 60 times faster.

The shipped rules are used with their durations divided by 60: half an hour is 30 s. All trainings begin well.
Some go wrong once Prometheus has seen enough of them.
"""

import contextlib
import random
import re
import string
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings
from tests.support.fake_server import HELD
from tests.support.http import CLICK, SEARCH, TERMINATE, WAIT_S, answer, free_port, group, served, serving
from tests.support.process import FAKE, Process, process, request
from tests.support.prometheus import RULES, Prometheus, prometheus, until

pytestmark = pytest.mark.timeout(3600)

SPEED = 60
ALERT_WAIT_S = 1200.0
"""Only a failing test waits so long."""
ROUND_S = 1.0
MAX_SEQUENCE_TOKENS = 1000
OTHER = {"type": "click", "name": "home.sale"}


# --- the trainings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """Completions of each round of a run, while it is well and when it has gone wrong. The human clicks."""

    well: list[str]
    sick: list[str]
    alert: str | None = None


def rationale(num_tokens: int) -> str:
    """Text that does not repeat itself. `FakePolicy` takes each character as a token."""
    return "".join(random.Random(num_tokens).choices(string.ascii_letters, k=num_tokens))


def completions(num_exact: int, num_tokens: int = 20, *others: str) -> list[str]:
    """40 of them: exact matches, these others, and clicks on something else."""
    some = [answer(CLICK, rationale(num_tokens))] * num_exact + list(others)
    return some + [answer(OTHER, rationale(num_tokens))] * (40 - len(some))


WELL = completions(24)
LEAVING = answer(TERMINATE, rationale(20))
TRAININGS = {
    "healthy": Training(WELL, WELL),
    "learning": Training(completions(8), completions(30, 98)),
    "collapse": Training(WELL, [LEAVING] * 40, "PolicyCollapsesToTerminate"),
    # 2 in a round are too few for half an hour's judgement.
    "slow-collapse": Training(WELL[:2], [LEAVING] * 2, "PolicyCollapsesToTerminate"),
    "format": Training(completions(24, 20, "{"), completions(10, 20, *["{"] * 20), "FormatFailuresRise"),
    # Self-certainty grows with the length: 12.5 nats and 16.4.
    "hacking": Training(WELL, completions(8, 98), "RewardHacking"),
    "long": Training(WELL, completions(24, 250), "RationaleLengthExplodes"),
    "repeating": Training(WELL, [answer(CLICK, "buy " * 8)] * 40, "RationaleRepeats"),
    "unscorable": Training(
        WELL, completions(20, 20, *[answer(SEARCH, rationale(MAX_SEQUENCE_TOKENS))] * 4), "UnscorableRollouts"
    ),
}


@contextlib.contextmanager
def training(url: str) -> Iterator[threading.Event]:
    """All trainings, one request a round. Set the event, and they go wrong."""
    stop, sick = threading.Event(), threading.Event()

    def train() -> None:
        with httpx.Client(base_url=url, timeout=WAIT_S) as client:
            number = 0
            while not stop.wait(ROUND_S):
                number += 1
                for name, each in TRAININGS.items():
                    texts = each.sick if sick.is_set() else each.well
                    body = {"groups": [group(*texts, truth=CLICK, prompt=f"{name} {number}")]}
                    client.post("/score", json=body, headers={"X-Run-ID": name}).raise_for_status()

    with background(train, stop):
        yield sick


# --- the services -----------------------------------------------------------------------------------


@contextlib.contextmanager
def stuck(service: Process) -> Iterator[None]:
    """The engine is held, the queue is full, and clients ask on. At the end all work is done."""
    stop = threading.Event()
    waiting = request("x" * 1700)
    answers: list[httpx.Response] = []

    def wait_for_answer(body: object) -> None:
        answers.append(httpx.post(f"{service.url}/score", json=body, timeout=ALERT_WAIT_S))

    def ask_on() -> None:
        with httpx.Client(base_url=service.url, timeout=WAIT_S) as client:
            while not stop.wait(ROUND_S / 4):
                short = client.post("/score", json=request(), headers={"X-Request-Timeout": "0.05"})
                large = client.post("/score", json=request("y" * 1700))
                assert (short.status_code, large.status_code) == (504, 429)

    with contextlib.ExitStack() as threads:
        threads.enter_context(background(lambda: wait_for_answer(request(HELD))))
        threads.callback(service.release)
        service.wait_until_scoring()
        threads.enter_context(background(lambda: wait_for_answer(waiting)))
        threads.callback(service.release)  # before the thread is joined
        until(lambda: queue_tokens(service) > 1700 or None, "the queue is full")
        with background(ask_on, stop):
            yield
    assert [answered.status_code for answered in answers] == [200, 200]


def queue_tokens(service: Process) -> float:
    rows = httpx.get(f"{service.url}/metrics").text.splitlines()
    return next(float(row.split()[-1]) for row in rows if row.startswith("shopr1_queue_tokens "))


@contextlib.contextmanager
def loading() -> Iterator[str]:
    """The URL of a service whose policy does not finish loading."""
    loaded = threading.Event()

    def load() -> FakePolicy:
        loaded.wait()
        return FakePolicy()

    with serving(create_app(Settings(), LocalEngine.opener(load))) as url:
        try:
            yield url
        finally:
            loaded.set()


@contextlib.contextmanager
def background(target: Callable[[], None], stop: threading.Event | None = None) -> Iterator[None]:
    """Run a function in a thread. Its error fails the test."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            target()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        if stop is not None:
            stop.set()
        thread.join()
    assert not errors, errors


# --- Prometheus -------------------------------------------------------------------------------------


def faster_rules(directory: Path) -> Path:
    """The shipped rules with shorter durations.

    The heartbeat's 120 s stay: it comes once a second.
    """
    seconds = {"m": 60, "h": 3600}
    text = re.sub(
        r"(?<!\w)(\d+)([mh])\b",
        lambda match: f"{int(match[1]) * seconds[match[2]] // SPEED}s",
        RULES.read_text("utf-8"),
    )
    text = re.sub(r"> (3600|86400)\b", lambda match: f"> {int(match[1]) // SPEED}", text)
    path = directory / "alerts.yml"
    path.write_text(text, "utf-8")
    return path


def fired(running: Prometheus) -> set[tuple[str, str]]:
    """All alerts that have fired so far, each with its run or its instance."""
    labels = running.labels('max_over_time(ALERTS{alertstate="firing"}[1h])')
    return {(each["alertname"], each.get("run") or each["instance"]) for each in labels}


def of_runs(alerts: set[tuple[str, str]]) -> set[tuple[str, str]]:
    return {(name, who) for name, who in alerts if who in TRAININGS}


def test_each_fault_fires_its_alert_and_nothing_else_does(tmp_path: Path) -> None:
    policy = FakePolicy(10.0, 0.1, max_sequence_tokens=MAX_SEQUENCE_TOKENS)
    absent = f"127.0.0.1:{free_port()}"
    with (
        served(policy) as url,
        loading() as loading_url,
        process(*FAKE, SHOPR1_MAX_QUEUE_TOKENS="2000") as service,
        stuck(service),
        training(url) as sick,
    ):
        well, load, full = (each.removeprefix("http://") for each in (url, loading_url, service.url))
        expected = {(each.alert, name) for name, each in TRAININGS.items() if each.alert is not None}
        expected |= {
            ("ServiceDown", absent),
            ("NotReady", load),
            *((name, full) for name in ("QueueSaturated", "RequestsRefused", "ErrorsRise")),
            ("EngineHeartbeatStale", full),
        }
        rules = faster_rules(tmp_path)
        with prometheus(tmp_path, well, load, full, absent, rules=rules) as running:
            hour_ago = "run:shopr1_exact_match:share offset 75s"
            until(lambda: running.values(hour_ago) or None, "there is a past to compare with", ALERT_WAIT_S)
            assert of_runs(fired(running)) == set()
            sick.set()
            until(lambda: expected <= fired(running) or None, f"{expected} fire", ALERT_WAIT_S)
            alerts = fired(running)
    assert of_runs(alerts) == of_runs(expected)
    assert {name for name, who in alerts if who == well} <= {"ServiceDown"}  # a late scrape
