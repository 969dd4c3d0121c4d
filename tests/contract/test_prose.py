"""The prose check: findings with their lines, and no false ones.

In samples an underscore means a space and a tilde an underscore, so that the check does not report this file.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLEAN = [
    ("question.md", "Status?_What_does_it_cost?_It_costs_little."),
    ("code.md", "The_code_`what_waits`_is_not_prose."),
    ("block.md", "Text.\n\n```text\nwhat_waits_in_vain\n```\n"),
    ("middle.md", "The_client_reads_what_the_server_sent."),
    ("key.py", "KEY_=_'stands'"),
    ("call.py", "stands(in~vain)"),
]
REPORTED = [
    ("paragraph.md", "First.\n\nThe_table\nstands_in_a_file.", 4, "stands"),
    ("wrapped.md", "A_request_in\nvain.", 1, "in_vain"),
    ("sentence.md", "A_limit.\nWhat_waits_longer_fails.", 2, "What_waits_longer_fails"),
    ("item.md", "-_First.\n-_Who_asks_waits.", 2, "Who_asks_waits"),
    ("cell.md", "|_a_|_Whoever_asks_|", 1, "Whoever_asks"),
    ("docstring.py", 'def_f():\n____"""Of_a_trial."""', 2, "Of"),
    ("comment.py", "x_=_1\n#_A_comment\n#_in_vain.", 3, "in_vain"),
    ("message.py", "x_=_f'{1}_was_told_{2}'", 1, "was_told"),
    ("name.py", "def_test~in~vain():\n____pass", 1, "in_vain"),
    ("value.yaml", "a:\n__b:_it_stands_here", 2, "stands"),
    ("hash.yaml", "a:_1_#_It_begins_anew.", 1, "begins_anew"),
    ("board.json", '{\n"title":_"A_title",\n"description":_"A_value_in_vain"}', 3, "in_vain"),
    ("make.toml", "#_All_in_vain.", 1, "in_vain"),
]


def plain(sample: str) -> str:
    return sample.replace("_", " ").replace("~", "_")


def run(file: Path, sample: str) -> subprocess.CompletedProcess[str]:
    file.write_text(plain(sample), "utf-8")
    command = [sys.executable, str(ROOT / "docs" / "style" / "check_prose.py"), str(file)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)


@pytest.mark.parametrize(("name", "sample"), CLEAN, ids=[name for name, _ in CLEAN])
def test_nothing_to_report(name: str, sample: str, tmp_path: Path) -> None:
    completed = run(tmp_path / name, sample)
    assert (completed.stdout, completed.stderr, completed.returncode) == ("", "", 0)


@pytest.mark.parametrize(("name", "sample", "line", "text"), REPORTED, ids=[name for name, *_ in REPORTED])
def test_reported_with_line_and_advice(name: str, sample: str, line: int, text: str, tmp_path: Path) -> None:
    completed = run(tmp_path / name, sample)
    assert f"{tmp_path / name}:{line}: {plain(text)} -> " in completed.stdout, completed.stderr
    assert completed.returncode == 1
