"""Each fault in docs/reliability.md names a test that exists, and each link there leads somewhere."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
TEXT = PAGE.read_text("utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT)


@functools.cache
def functions_of(path: str) -> set[str]:
    """Test functions of a file."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def rows_of_faults() -> list[list[str]]:
    """Cells of each row of the first table, without its head."""
    table = TEXT[TEXT.index("| fault |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table]


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_named_tests_exist(path: str, name: str) -> None:
    assert (ROOT / path).is_file()
    assert not name or name in functions_of(path)


@pytest.mark.parametrize("row", rows_of_faults(), ids=lambda row: row[0])
def test_each_fault_has_all_cells_and_a_test(row: list[str]) -> None:
    assert len(row) == 5
    assert all(row)
    assert re.search(r"`tests/[\w/]+\.py::test_\w+`", row[-1])


def test_links_of_the_page_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXT)
    assert [link for link in links if not (PAGE.parent / link).exists()] == []


def test_the_page_is_linked_from_the_readme() -> None:
    assert "](docs/reliability.md)" in (ROOT / "README.md").read_text("utf-8")
