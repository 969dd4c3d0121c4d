"""Values of data sets as JSON types. tests/integration/data_sets compares with the libraries themselves."""

import datetime
import json
from collections import OrderedDict
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from shopr1_client.data_set_values import to_json_types

DAY = datetime.datetime(2026, 5, 1)


@dataclass
class ArrowScalar:
    """As PyArrow's scalars convert themselves."""

    value: object

    def as_py(self) -> object:
        return self.value


@dataclass
class PolarsSeries:
    """As polars' series convert themselves."""

    def to_list(self) -> list[int]:
        return [1, 2]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", "a"),
        ({"type": "terminate"}, {"type": "terminate"}),
        ({"text": None, "n": 3, "x": 2.5, "is": True}, {"text": None, "n": 3, "x": 2.5, "is": True}),
        (OrderedDict(type="a"), {"type": "a"}),
        (
            MappingProxyType({"type": "a", "more": MappingProxyType({"x": 1})}),
            {"type": "a", "more": {"x": 1}},
        ),
        ({"type": np.str_("a"), "n": np.int64(3), "x": np.float32(0.5)}, {"type": "a", "n": 3, "x": 0.5}),
        (
            {"ids": np.array([1, 2]), "rows": np.array([{"a": 1}], dtype=object)},
            {"ids": [1, 2], "rows": [{"a": 1}]},
        ),
        (np.array({"type": "a"}, dtype=object), {"type": "a"}),
        (ArrowScalar({"type": "a", "time": DAY}), {"type": "a", "time": {"datetime": "2026-05-01 00:00:00"}}),
        ({"type": ArrowScalar("a"), "seen": PolarsSeries()}, {"type": "a", "seen": [1, 2]}),
        ({"text": DAY}, {"text": {"datetime": "2026-05-01 00:00:00"}}),
        ({"text": DAY.date()}, {"text": {"date": "2026-05-01"}}),
        ({"text": datetime.time(9)}, {"text": {"time": "09:00:00"}}),
        ({"text": np.datetime64("2026-05-01", "s")}, {"text": {"datetime": "2026-05-01 00:00:00"}}),
        ({"text": Decimal("3.50")}, {"text": {"Decimal": "3.50"}}),
        ({"text": b"a"}, {"text": {"bytes": "b'a'"}}),
        ({"pair": (1, DAY)}, {"pair": [1, {"datetime": "2026-05-01 00:00:00"}]}),
    ],
    ids=str,
)
def test_objects(value: Any, expected: object) -> None:
    converted = to_json_types(value)
    assert converted == expected
    assert json.loads(json.dumps(converted)) == converted


@pytest.mark.parametrize("value", [None, 1.5, DAY, [{"type": "a"}], b"{}"], ids=str)
def test_other_values_stay(value: Any) -> None:
    assert to_json_types(value) is value


def test_a_date_is_never_text() -> None:
    """The text that it was read from is lost, and another text would be scored."""
    for value in (DAY, DAY.date(), np.datetime64("2026-05-01"), np.datetime64("2026-05-01", "ns")):
        converted = to_json_types({"text": value})
        assert isinstance(converted, dict)
        assert not isinstance(converted["text"], str)


def test_nesting_beyond_what_json_can_write() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep, "b": 1}
    assert to_json_types(deep) is deep
    while deep:  # without recursion
        deep = deep["a"]


@pytest.mark.parametrize("value", [{("a", 1): 2}, {"type": "click", "more": {("a", 1): 2}}], ids=str)
def test_a_key_that_json_cannot_have(value: Any) -> None:
    with pytest.raises(ValueError, match="not tuple"):
        to_json_types(value)
