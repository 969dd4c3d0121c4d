"""Values of data sets as JSON types.

Ground truths come from `datasets`, pandas, polars, PyArrow and NumPy, which deliver more than JSON has:
scalars of their own, dates that were read from text, missing values in many forms. A value without a JSON
type becomes an object that names its type, `{"datetime": "2026-05-01 00:00:00"}`. Where the reward needs
text, the service refuses it; elsewhere it ignores it, like every other key. It is never turned into text,
because the original text is lost: `2026-05-01` and `2026-05-01T00:00` give the same date.

A text that a library has made of another value cannot be recognised: of a field with `"a"` and `3.50` in two
rows, `polars.read_ndjson` makes `"a"` and `"3.5"`.
"""

import json
from collections.abc import Mapping
from typing import Any

_CONVERSIONS = ("as_py", "tolist", "to_list")
"""Methods of PyArrow, NumPy with pandas, and polars that return Python objects."""


def to_json_types(value: object) -> object:
    """An object of a data set in JSON types. Values that are no objects are returned as they are.

    Raises:
        ValueError: a key is neither text nor a number.

    >>> import datetime
    >>> to_json_types({"type": "click", "name": "a", "time": datetime.date(2026, 5, 1)})
    {'type': 'click', 'name': 'a', 'time': {'date': '2026-05-01'}}
    """
    value = _converted(value)
    if not isinstance(value, Mapping) or (
        type(value) is dict and all(type(v) is str for v in value.values())
    ):
        return value
    try:
        return json.loads(json.dumps(value, default=_encoded))
    except RecursionError:  # it cannot be sent either, which is an error of its own
        return value
    except TypeError as error:
        raise ValueError(str(error)) from None  # a key that JSON cannot have, such as a tuple


def _encoded(value: object) -> object:
    """A value that `json` does not know, as one that it knows, or that this function knows."""
    if isinstance(value, Mapping):
        return dict(value)
    converted = _converted(value)
    return {type(value).__name__: str(value)} if converted is value else converted


def _converted(value: Any) -> Any:  # noqa: ANN401  # an object of any library
    """A value by its library's own conversion, or the value itself."""
    method = next((getattr(value, name) for name in _CONVERSIONS if hasattr(value, name)), None)
    return value if method is None else method()
