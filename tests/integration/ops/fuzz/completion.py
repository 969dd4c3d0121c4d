"""Fuzzes the parsing of completions: it never raises, and the result agrees with the text."""

import contextlib
import json
import sys

import atheris

with atheris.instrument_imports(include=["shopr1_rewards"]):
    from shopr1_rewards.completion import Envelope, parse_strict, parse_tolerant, strip_end
    from shopr1_rewards.format_error import FormatError, FormatFailure, InvalidFormatError
    from shopr1_rewards.strict_json import load

from tests.integration.ops.fuzz.harness import fuzz
from tests.support.http import CLICK, SEARCH, answer

END_TOKENS = ("<|im_end|>", "</s>")
SEEDS = (
    answer(),
    answer(CLICK, 'a "quoted" word\\n and 漢字 and 😀'),
    answer(SEARCH, "") + "<|im_end|>\n",
    'Sure! ```json\n{"action": {"type": "x"}, "rationale": "\\u00e9\\ud83d\\ude00", "more": [1e5]}\n```',
    '{"rationale": "r", "rationale": NaN, "action": {"type": "\\ud800"}}',
    "[[[[{}]]]]",
)


def check(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    strict, tolerant = parse_strict(text, END_TOKENS), parse_tolerant(text, END_TOKENS)
    for read in (strict, tolerant):
        check_failure(read) if isinstance(read, FormatFailure) else check_envelope(read, text)
    if isinstance(strict, Envelope):
        assert tolerant == strict
        check_against_json(strict, text)
    check_load(text)


def check_failure(failure: FormatFailure) -> None:
    assert failure.error in FormatError
    assert failure.message


def check_envelope(envelope: Envelope, text: str) -> None:
    """Assert that the span contains the encoded rationale."""
    start, end = envelope.rationale_span
    assert 0 < start <= end < len(text)
    assert text[start - 1] == text[end] == '"'
    assert json.loads(text[start - 1 : end + 1]) == envelope.rationale
    envelope.rationale.encode()


def check_against_json(envelope: Envelope, text: str) -> None:
    """Assert that Python's more lenient JSON parser gives the same result."""
    value = json.loads(strip_end(text, END_TOKENS), parse_int=float)
    assert value["rationale"] == envelope.rationale
    assert value["action"] == {"type": envelope.action_type, **envelope.fields}
    assert {*envelope.extra_keys, "rationale", "action"} == set(value)


def check_load(text: str) -> None:
    with contextlib.suppress(InvalidFormatError, json.JSONDecodeError):
        assert load(text) == json.loads(text, parse_int=float)


def main() -> int:
    fuzz(check, map(str.encode, SEEDS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
