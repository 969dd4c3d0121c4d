"""Ground truths as `datasets`, pandas, polars and PyArrow deliver them: read as in the file, or refused.

The file's own JSON, read by Python, is the reference. Nothing is scored: a ground truth is sent through the
client's JSON to the rules that the service applies.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas
import polars
import pyarrow
import pyarrow.json
import pyarrow.parquet
import pytest

from shopr1_client.grouping import Grouping, Rollout
from shopr1_rewards import Action, GroundTruthError, load_recipe, read_ground_truth

RECIPE = load_recipe("shop_r1")

CLICK = {"type": "click", "name": "add_to_cart.buy_now"}
TERMINATE = {"type": "terminate"}


def search(text: Any, **more: Any) -> dict[str, Any]:
    return {"type": "type_and_submit", "name": "nav_bar.search_input", "text": text, **more}


RAGGED = [CLICK, TERMINATE, search("green tea"), search("2026-05-01")]
DATES = [search("2026-05-01"), search("2026-06-01")]
TIMES = [search("2026-05-01 10:30:00"), search("2026-06-01T00:00:00")]
NUMERALS = [search("42"), search("007"), search("1e3"), search("3.0")]
TEXTS = [search("None"), search("null"), search("nan"), search("true"), search("🎁"), search("é")]
EXTRAS = [
    search("tea", price=3, seen=["a", "b"], at="2026-05-01", meta={"x": 1.5, "day": "2026-05-02"}),
    {**CLICK, "price": 3.5, "seen": [], "at": "2026-05-01", "meta": None},
    {**TERMINATE, "price": None, "seen": None, "at": "2026-06-01", "meta": {"x": 2}},
]
TABLES = {
    "ragged": RAGGED,
    "dates": DATES,
    "times": TIMES,
    "numerals": NUMERALS,
    "texts": TEXTS,
    "extras": EXTRAS,
}


# --- readers ----------------------------------------------------------------------------------------


def write(path: Path, truths: Sequence[Any]) -> Path:
    lines = [json.dumps({"prompt": f"page {i}", "ground_truth": truth}) for i, truth in enumerate(truths)]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def load_json(path: Path) -> list[Any]:
    table = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(path.parent / "c")
    )
    return [row["ground_truth"] for row in table]


def from_list(path: Path) -> list[Any]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [row["ground_truth"] for row in datasets.Dataset.from_list(rows)]


def with_pandas_format(path: Path) -> list[Any]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return list(datasets.Dataset.from_list(rows).with_format("pandas")[:]["ground_truth"])


def with_numpy_format(path: Path) -> list[Any]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [row["ground_truth"] for row in datasets.Dataset.from_list(rows).with_format("numpy")]


def read_pandas(path: Path) -> list[Any]:
    return list(pandas.read_json(path, lines=True)["ground_truth"])


def pandas_parquet(path: Path) -> list[Any]:
    frame = pandas.read_json(path, lines=True)
    frame.to_parquet(path.with_suffix(".parquet"))
    return list(pandas.read_parquet(path.with_suffix(".parquet"))["ground_truth"])


def read_polars(path: Path) -> list[Any]:
    return list(polars.read_ndjson(path)["ground_truth"])


def polars_rows(path: Path) -> list[Any]:
    return [row["ground_truth"] for row in polars.read_ndjson(path).iter_rows(named=True)]


def polars_parquet(path: Path) -> list[Any]:
    polars.read_ndjson(path).write_parquet(path.with_suffix(".parquet"))
    return list(pyarrow.parquet.read_table(path.with_suffix(".parquet"))["ground_truth"].to_pylist())


def arrow_scalars(path: Path) -> list[Any]:
    return list(pyarrow.json.read_json(path)["ground_truth"])


def arrow_parquet(path: Path) -> list[Any]:
    pyarrow.parquet.write_table(pyarrow.json.read_json(path), path.with_suffix(".parquet"))
    return list(pandas.read_parquet(path.with_suffix(".parquet"))["ground_truth"])


READERS: list[Callable[[Path], list[Any]]] = [
    load_json,
    from_list,
    with_pandas_format,
    with_numpy_format,
    read_pandas,
    pandas_parquet,
    read_polars,
    polars_rows,
    polars_parquet,
    arrow_scalars,
    arrow_parquet,
]


# --- results ---------------------------------------------------------------------------


def received(truths: Sequence[Any]) -> Iterator[Action | str]:
    """For each row: the action that the service reads, or the field that it refuses."""
    for truth in truths:
        [group] = Grouping([Rollout(prompt="page", completion="", ground_truth=truth)]).groups
        body = json.loads(json.dumps(group.model_dump(mode="python")))
        try:
            yield read_ground_truth(body["ground_truth"], RECIPE)
        except GroundTruthError as error:
            yield str(error.field)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@pytest.mark.parametrize("table", TABLES)
def test_a_ground_truth_is_right_or_refused(
    reader: Callable[[Path], list[Any]], table: str, tmp_path: Path
) -> None:
    truths = TABLES[table]
    expected = [read_ground_truth(truth, RECIPE) for truth in truths]
    found = list(received(reader(write(tmp_path / "rows.jsonl", truths))))
    assert len(found) == len(expected)
    wrong = [pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1] and pair[0] != "text"]
    assert wrong == []
    is_dated = table in ("dates", "times")
    assert ("text" not in found) or is_dated


def test_polars_makes_text_of_values_in_a_column_of_text(tmp_path: Path) -> None:
    """Known and not to be recognised: docs/trainers/README.md warns of it."""
    truths = [search("tea"), search(3.50), search(True), search(["a"])]
    path = write(tmp_path / "rows.jsonl", truths)
    assert [truth["text"] for truth in read_polars(path)] == ["tea", "3.5", "true", '["a"]']
    written = [json.loads(line)["ground_truth"] for line in path.read_text("utf-8").splitlines()]
    assert list(received(written))[1:] == ["text"] * 3
