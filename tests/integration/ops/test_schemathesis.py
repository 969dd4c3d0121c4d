"""schemathesis against a live service: every response is documented in openapi.yaml.

It sends examples, boundary values, valid and invalid random data, unknown methods, and sequences along links.
"""

import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support.http import CLICK, answer
from tests.support.process import EMBEDDED, FAKE, process

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[2] / "openapi.yaml"
CONFIG = HERE / "schemathesis.toml"
KEY = "a-key-of-the-service-0123456789"
SEED = "1"

# Values of a response for the next request.
LINKS: dict[tuple[str, str], Any] = {
    ("/recipes", "get"): {"operationId": "getRecipe", "parameters": {"name": "$response.body#/0/name"}},
    ("/info", "get"): {
        "operationId": "getRecipe",
        "parameters": {"name": "$response.body#/default_recipe/name"},
    },
    ("/labels", "put"): {
        "operationId": "slimeReward",
        "requestBody": {"prompt": "$request.body#/labels/0/prompt", "response": answer(CLICK)},
    },
}


def linked(document: dict[str, Any]) -> dict[str, Any]:
    for (path, method), link in LINKS.items():
        document["paths"][path][method]["responses"]["200"]["links"] = {"next": link}
    return document


def keyed(document: dict[str, Any]) -> dict[str, Any]:
    """The document of a service with keys, which are then required except for the health routes."""
    document["security"] = [scheme for scheme in document["security"] if scheme]
    return document


def check(url: str, document: Mapping[str, Any], directory: Path, *options: str) -> None:
    """Run schemathesis, which must find no error."""
    path = directory / "openapi.yaml"
    path.write_text(yaml.safe_dump(document), "utf-8")
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", str(path)]
    always = ("--url", url, "--request-timeout", "120", "--seed", SEED, "--continue-on-failure", "--no-color")
    completed = subprocess.run(
        [*command, *always, *options], cwd=directory, capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr


def count(url: str, **headers: str) -> Counter[str]:
    """Number of requests by route, counted by the service."""
    text = httpx.get(f"{url}/metrics", headers=headers).text
    sent: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "shopr1_requests_total":
                sent[f"{sample.labels['method']} {sample.labels['route']}"] += int(sample.value)
    return sent


def report(sent: Counter[str], capsys: pytest.CaptureFixture[str], at_least: int) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\n{sent.total():6} requests in all\n")
        sys.stdout.writelines(f"{number:6} {operation}\n" for operation, number in sent.most_common())
    assert sent.total() >= at_least


def original() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(DOCUMENT.read_text("utf-8"))
    return document


@pytest.mark.timeout(1800)
def test_a_service_without_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with process(*FAKE) as service:
        check(service.url, linked(original()), tmp_path, "--max-examples", "200")
        report(count(service.url), capsys, at_least=3000)


@pytest.mark.timeout(1800)
def test_a_service_with_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    authorization = f"Bearer {KEY}"
    with process(*FAKE, SHOPR1_API_KEYS=KEY) as service:
        given = ("--header", f"Authorization: {authorization}", "--max-examples", "50")
        check(service.url, keyed(linked(original())), tmp_path, *given)
        report(count(service.url, Authorization=authorization), capsys, at_least=1000)


@pytest.mark.timeout(1800)
def test_the_real_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with process(*EMBEDDED) as service:
        check(service.url, linked(original()), tmp_path, "--max-examples", "20")
        report(count(service.url), capsys, at_least=500)
