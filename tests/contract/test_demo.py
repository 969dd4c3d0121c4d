"""The demo against a running server: it prints the rewards that were computed by hand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shopr1_rewards import load_recipe
from shopr1_service.policy.fake import FakePolicy
from tests.contract.test_examples import EXPECTED_TERMS, NO_RATIONALE
from tests.support.http import WAIT_S, served

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def run_demo(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(DEMO), *arguments],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=WAIT_S,
        check=False,
    )


def rows(printed: str) -> list[list[str]]:
    """The cells of all rows of all tables, with wrapped lines joined."""
    found: list[list[str]] = []
    for line in printed.splitlines():
        if line.startswith(("├", "┡")):
            found.append([])
        elif line.startswith("│"):
            cells = [cell.strip() for cell in line.split("│")[1:-1]]
            found[-1] = [*map("".join, zip(found[-1], cells, strict=True))] if found[-1] else cells
    return found


def number(value: float) -> str:
    return f"{value:.4f}" if value else "0"


@pytest.fixture(scope="module")
def printed() -> str:
    with served(FakePolicy(26.0)) as url:
        completed = run_demo("--url", url)
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr == ""
    return completed.stdout


def test_numbers_of_every_row(printed: str) -> None:
    expected = []
    for name, rollouts in EXPECTED_TERMS.items():
        for i, terms in enumerate(rollouts):
            # 0.005 · 26 if the completion is valid and has a rationale
            certainty = 0.13 if terms[0] and (name, i) != NO_RATIONALE else 0.0
            expected.append([number(value) for value in (*terms, certainty, sum(terms) + certainty)])
    assert [row[1:7] for row in rows(printed)] == expected


def test_one_table_per_session(printed: str) -> None:
    titles = [line for line in printed.splitlines() if ": the human did " in line]
    assert [title.partition(":")[0] for title in titles] == list(EXPECTED_TERMS)
    actions = [json.loads(title.partition(" did ")[2]) for title in titles]
    assert [action["type"] for action in actions] == ["type_and_submit", "click", "terminate"]
    header = "predicted format action_type attribute value self_certainty reward why"
    assert [" ".join(re.findall(r"\w+", line)) for line in printed.splitlines() if line.startswith("┃")] == [
        header
    ] * len(EXPECTED_TERMS)


@pytest.mark.parametrize(
    ("row", "predicted", "why"),
    [
        (0, "type_and_submit(name='nav_bar.search_input'", "exact match"),
        (1, "set of 6", "text alike 0.800"),
        (2, "search_button", "name alike 0.750, does not pass"),
        (4, "click(name='home.sale')", "wrong type"),
        (5, "type_and_submit(name='nav_bar.search_input')", "text missing"),
        (6, "-", "invalid_json"),
        (10, "click(name='')", "name missing"),
        (12, "-", "extra_text"),
        (13, "-", "duplicate_key"),
        (17, "scroll(", "unknown type"),
        (18, "terminate()", "exact match"),
        (19, "-", "wrong_type"),
    ],
)
def test_explanations(printed: str, row: int, predicted: str, why: str) -> None:
    cells = rows(printed)[row]
    # Wrapping removes the spaces at the ends of lines.
    assert predicted.replace(" ", "") in cells[0].replace(" ", "")
    assert why.replace(" ", "") in cells[7].replace(" ", "")


def test_summary_line(printed: str) -> None:
    text = " ".join(printed.split())
    digest = load_recipe("shop_r1").digest[:19]
    assert re.search(
        rf"Scored 20 rollouts over 3 prompts in [\d.]+ s with fake, recipe shop_r1 \({digest}", text
    )


def test_an_unscorable_rollout_fails_the_demo() -> None:
    # Only the longest of the three prompts exceeds the limit.
    with served(FakePolicy(26.0, max_sequence_tokens=2350)) as url:
        completed = run_demo("--url", url)
    assert completed.returncode == 1
    last = [row[1:7] for row in rows(completed.stdout)][14]
    assert last == ["0.5000", "0.3000", "0", "0", "null", "null"]
