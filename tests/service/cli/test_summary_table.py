"""The table that `shopr1 score` prints in the end."""

import json
import re
from pathlib import Path

from tests.support.command_line import Run, write_lines
from tests.support.http import CLICK, answer, group


def test_summary(shopr1: Run, url: str, tmp_path: Path) -> None:
    # A label may have more than its action, also a number that int() rejects.
    label = json.dumps(CLICK)[:-1] + f', "order": {"1" * 5000}}}'
    rollouts = write_lines(
        tmp_path / "in.jsonl",
        group(answer(), answer(rationale="")),
        group(answer(CLICK), answer({"type": "click", "name": ""}), "no", truth=CLICK),
        group(answer(CLICK), truth=label, prompt="p" * 500),
    )
    ended = shopr1("score", rollouts, "-o", tmp_path / "out.jsonl", "--url", url)
    rows = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in ended.err.splitlines() if line[:1] in "│┃"]
    assert [row for row in rows if any(row)] == [
        ["human's action", "click", "terminate", "all"],
        ["rollouts", "4", "2", "6"],
        ["unscorable", "1", "0", "1"],
        # click: of three scored ones two are valid, of the right type; one has a name, and the right one.
        # 0.5 · 2/3, 0.3 · 2/3, 0.2/3, 1000/3, 0.13 · 2/3; all: over five.
        ["format", "0.3333", "0.5000", "0.4000"],
        ["action_type", "0.2000", "0.3000", "0.2400"],
        ["attribute", "0.0667", "0.0000", "0.0400"],
        ["value", "333.3333", "0.0000", "200.0000"],
        # terminate: one of two has no rationale
        ["self_certainty", "0.0867", "0.0650", "0.0780"],
        # (1001.13 + 0.93 + 0)/3, (0.93 + 0.8)/2, (1002.06 + 1.73)/5
        ["reward", "334.0200", "0.8650", "200.7580"],
        # The unscorable one is an exact match as well.
        ["exact match", "0.5000", "1.0000", "0.6667"],
    ]
