"""Parser of completions: one JSON object with a rationale and an action.

    {"rationale": "<why>", "action": {"type": "<type>", "<attribute>": "<value>", …}}

Keys are in any order. Every error of a policy has a code (`FormatError`), and no completion raises an
exception. The parser knows JSON and the envelope only; `actions.py` knows the action space's types and
attributes.

It scans the members of the outer object itself, because it needs the *position* of the rationale's
characters in the raw text.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from json.decoder import scanstring  # type: ignore[attr-defined]  # the C scanner; typeshed leaves it out
from typing import Any, NamedTuple

from shopr1_rewards.format_error import FormatError, FormatFailure, InvalidFormatError
from shopr1_rewards.json_objects import object_spans
from shopr1_rewards.recipe import Which
from shopr1_rewards.strict_json import (
    DECODER,
    WHITESPACE,
    Number,
    Span,
    check_depth,
    check_text,
    may_have_surrogates,
    scan_members,
    skip_space,
)

THINKING_BEGINS, THINKING_ENDS = "<think>", "</think>"

_KEYS = frozenset(("rationale", "action"))
_SPACE = f"[{WHITESPACE}]*+"
_USUAL_BEGIN = re.compile(rf'\{{{_SPACE}"rationale"{_SPACE}:{_SPACE}"')
_USUAL_MIDDLE = re.compile(rf'{_SPACE},{_SPACE}"action"{_SPACE}:{_SPACE}\{{')
_USUAL_END = re.compile(rf"{_SPACE}\}}")


class Envelope(NamedTuple):
    """The content of a well-formed completion.

    Attributes:
        rationale: the decoded rationale.
        rationale_span: position of its content in the raw completion: between the quotes, with escapes as
            written.
        action_type: the action's `type`.
        fields: the action's other members, of any JSON type.
        extra_keys: keys of the outer object besides `rationale` and `action`.
    """

    rationale: str
    rationale_span: Span
    action_type: str
    fields: dict[str, Any]
    extra_keys: tuple[str, ...]


def strip_end(text: str, end_tokens: Sequence[str] = ()) -> str:
    """`text` without trailing white space and end-of-turn tokens; positions in it do not change.

    >>> strip_end("{}<|im_end|> ", ["<|im_end|>"])
    '{}'
    """
    tails = (*WHITESPACE, *filter(None, end_tokens))
    if not text.endswith(tails):
        return text
    end = len(text)
    while tail := next((tail for tail in tails if text.endswith(tail, 0, end)), None):
        end -= len(tail)
    return text[:end]


def parse_strict(text: str, end_tokens: Sequence[str] = ()) -> Envelope | FormatFailure:
    """Parse a completion that must be exactly one JSON object.

    White space around it and the policy's `end_tokens` after it are ignored.

    >>> parse_strict('{"rationale": "why", "action": {"type": "terminate"}}').rationale_span
    Span(start=15, end=18)
    >>> parse_strict('Sure! {"rationale": ""}').error
    <FormatError.EXTRA_TEXT: 'extra_text'>
    """
    text = strip_end(text, end_tokens)
    start = 0 if text.startswith("{") else skip_space(text, 0)
    try:
        if start == len(text):
            raise InvalidFormatError(FormatError.EMPTY, "the completion is empty")
        if text[start] != "{":
            raise _not_an_object(text, start)
        envelope, end = _parse_envelope(text, start)
        if end < len(text):  # which is not white space
            raise InvalidFormatError(FormatError.EXTRA_TEXT, f"text after the object, at character {end}")
        return envelope
    except InvalidFormatError as exception:
        return exception.failure


Check = Callable[[Envelope], FormatFailure | None]
"""The reason why a well-formed answer is not valid in the recipe's action space, or None."""


class _Answer(NamedTuple):
    span: Span
    envelope: Envelope


def parse_tolerant(
    text: str,
    end_tokens: Sequence[str] = (),
    which: Which = Which.FIRST,
    check: Check = lambda _envelope: None,
) -> Envelope | FormatFailure:
    """Parse a valid answer in a completion, ignoring everything around it.

    An answer can begin at any brace: inside a code fence, another object or a list, and after braces, quotes
    and brackets that are never closed. An answer inside an answer does not count. The time is linear in the
    text.

    Args:
        text: the raw completion.
        end_tokens: the policy's end-of-turn and padding tokens, which are ignored at the end.
        which: which one of several valid answers.
        check: refuses an answer that the recipe makes invalid.

    Returns:
        The answer, or the failure of the first object, after the thinking if `which` asks for that.

    >>> parse_tolerant('Sure! {"rationale": "why", "action": {"type": "terminate"}} Bye.').action_type
    'terminate'
    """
    text = strip_end(text, end_tokens)
    answers = list(_answers(text, check))
    begin, end = _considered(text, answers) if which is Which.AFTER_THINKING else (0, len(text))
    considered = [answer.envelope for answer in answers if begin <= answer.span.start < end]
    if considered:
        return considered[-1 if which is Which.LAST else 0]
    return _first_failure(text, begin, end, check)


def _answers(text: str, check: Check) -> Iterator[_Answer]:
    """Valid answers from left to right, each after the end of the previous one."""
    previous_end = 0
    # An object nests at most MAX_DEPTH levels, so that no text is parsed more often than that.
    for start, end in object_spans(text, _KEYS):
        if start < previous_end:
            continue
        try:
            check_depth(text, start, end)
            # Alone: to report a syntax error, `json` counts the lines of the whole text before it.
            envelope, _ = _parse_envelope(text[start:end], 0)
        except InvalidFormatError:
            continue
        if check(envelope) is None:
            yield _Answer(Span(start, end), _moved(envelope, start))
            previous_end = end


def _moved(envelope: Envelope, offset: int) -> Envelope:
    start, end = envelope.rationale_span
    return envelope._replace(rationale_span=Span(start + offset, end + offset))


def _considered(text: str, answers: Sequence[_Answer]) -> Span:
    """The text after the last end of a thinking block, up to the beginning of one that has no end.

    Marks inside an answer are part of its values.
    """
    outside, position = [], 0
    for span, _ in answers:
        outside += [text[position : span.start], " " * (span.end - span.start)]
        position = span.end
    marks = "".join(outside) + text[position:]
    begin = marks.rfind(THINKING_ENDS) + 1  # an object cannot begin within the mark
    end = marks.find(THINKING_BEGINS, begin)
    return Span(begin, len(text) if end == -1 else end)


def _first_failure(text: str, begin: int, end: int, check: Check) -> FormatFailure:
    start = text.find("{", begin, end)
    if start == -1:
        return FormatFailure(FormatError.NO_OBJECT if text else FormatError.EMPTY, _no_object(text, end))
    try:
        envelope, _ = _parse_envelope(text, start)
    except InvalidFormatError as exception:
        return exception.failure
    return check(envelope) or FormatFailure(FormatError.NO_OBJECT, _no_object(text, end))


def _no_object(text: str, end: int) -> str:
    where = "" if end == len(text) else f" before {THINKING_BEGINS}, which is never closed"
    return f"no JSON object in the completion{where}"


def _parse_envelope(text: str, start: int) -> tuple[Envelope, int]:
    """The envelope that begins at `start`, and the position after it."""
    check_depth(text, start)
    if (usual := _usual_envelope(text, start)) is not None:
        return usual
    try:
        values, spans, end = scan_members(text, start)
    except json.JSONDecodeError as error:
        raise _syntax_error(error) from None
    try:
        if may_have_surrogates(text):
            check_text(values)
        return _envelope(values, spans), end
    except InvalidFormatError as exception:
        exception.position = end
        raise


def _usual_envelope(text: str, start: int) -> tuple[Envelope, int] | None:
    """The same for what policies usually write: `{"rationale": "…", "action": {…}}`, without other keys.

    None: anything else, or an error, which is found when the members are read one by one.
    """
    begin = _USUAL_BEGIN.match(text, start)
    if begin is None or may_have_surrogates(text):
        return None
    try:
        rationale, rationale_end = scanstring(text, begin.end(), True)
        middle = _USUAL_MIDDLE.match(text, rationale_end)
        if middle is None:
            return None
        action, action_end = DECODER.raw_decode(text, middle.end() - 1)
    except (json.JSONDecodeError, InvalidFormatError):
        return None
    end = _USUAL_END.match(text, action_end)
    if end is None or not isinstance(action_type := action.pop("type", None), str):
        return None
    return Envelope(rationale, Span(begin.end(), rationale_end - 1), action_type, action, ()), end.end()


def _not_an_object(text: str, start: int) -> InvalidFormatError:
    """Distinguish a JSON value that is not an object, text around an object, and text without JSON."""
    try:
        check_depth(text, start)
        _, end = DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        if "{" in text:
            return InvalidFormatError(FormatError.EXTRA_TEXT, "text before the object")
        return _syntax_error(error)
    except InvalidFormatError as exception:
        return exception
    if skip_space(text, end) != len(text):
        return InvalidFormatError(FormatError.EXTRA_TEXT, "the completion is not one JSON object")
    return InvalidFormatError(FormatError.NOT_AN_OBJECT, "the completion is JSON, but not an object")


def _syntax_error(error: json.JSONDecodeError) -> InvalidFormatError:
    message = error.msg.removesuffix(" at")  # the suffix of some of the scanner's messages
    return InvalidFormatError(FormatError.INVALID_JSON, f"{message} at character {error.pos}", error.pos)


def _envelope(values: dict[str, Any], spans: Mapping[str, tuple[int, int]]) -> Envelope:
    rationale, action = values.get("rationale"), values.get("action")
    action_type = action.get("type") if isinstance(action, dict) else None
    if not (isinstance(rationale, str) and isinstance(action, dict) and isinstance(action_type, str)):
        raise _flaw(values)
    start, end = spans["rationale"]
    del action["type"]
    extra_keys = tuple([key for key in values if key not in _KEYS]) if len(values) > len(_KEYS) else ()
    return Envelope(rationale, Span(start + 1, end - 1), action_type, action, extra_keys)


def _flaw(values: dict[str, Any]) -> InvalidFormatError:
    """The first part that is missing or of the wrong type."""
    if not isinstance(values.get("rationale"), str):
        return _part_flaw(values, "rationale", str, FormatError.MISSING_RATIONALE)
    if not isinstance(action := values.get("action"), dict):
        return _part_flaw(values, "action", dict, FormatError.MISSING_ACTION)
    return _part_flaw(action, "type", str, FormatError.MISSING_ACTION_TYPE, "action.type")


def _part_flaw(
    values: dict[str, Any], key: str, kind: type, missing: FormatError, path: str = ""
) -> InvalidFormatError:
    path = path or key
    if key not in values:
        return InvalidFormatError(missing, f"{path} is missing")
    return InvalidFormatError(FormatError.WRONG_TYPE, wrong_type_message(path, values[key], kind))


def wrong_type_message(path: str, value: object, expected: type) -> str:
    """`action.name must be a string, not a number`."""
    return f"{path} must be {_JSON_NAMES[expected]}, not {_JSON_NAMES[type(value)]}"


_JSON_NAMES: dict[type, str] = {
    str: "a string",
    dict: "an object",
    list: "a list",
    Number: "a number",
    bool: "a boolean",
    type(None): "null",
}
