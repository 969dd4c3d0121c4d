import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shopr1_rewards import (
    Envelope,
    FormatError,
    FormatFailure,
    completion,
    json_objects,
    parse_strict,
    parse_tolerant,
)
from shopr1_rewards.completion import strip_end
from shopr1_rewards.recipe import Which
from shopr1_rewards.strict_json import MAX_DEPTH, scan_members
from tests.support.completions import CountingPattern, accepted, refused, verdict

ANSWER = '{"rationale": "why", "action": {"type": "terminate"}}'
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "")
PARSERS = pytest.mark.parametrize("parse", [parse_strict, parse_tolerant])

Parser = Callable[[str], Envelope | FormatFailure]


def with_rationale(written: str) -> str:
    return f'{{"rationale": {written}, "action": {{"type": "terminate"}}}}'


def with_action(written: str) -> str:
    return f'{{"rationale": "r", "action": {written}}}'


def with_type(written: str) -> str:
    return with_action(f'{{"type": {written}}}')


def with_extra(written: str) -> str:
    return f'{{"rationale": "r", "action": {{"type": "terminate"}}, "extra": {written}}}'


def lists(depth: int) -> str:
    return "[" * depth + "]" * depth


def objects(depth: int) -> str:
    return '{"a":' * (depth - 1) + "{}" + "}" * (depth - 1)


PLACES: dict[str, Callable[[str], str]] = {
    "rationale": with_rationale,
    "action": with_action,
    "type": with_type,
    "extra": with_extra,
    "nested": lambda written: with_extra(f'[{{"a": {written}}}]'),
    "alone": str,
}


# --- refused: by name -------------------------------------------------------------------------------

REFUSED: dict[FormatError, dict[str, str]] = {
    FormatError.EMPTY: {"nothing": "", "white space": " \t\r\n"},
    FormatError.INVALID_JSON: {
        "prose": "Sure!",
        "opening brace alone": "{",
        "closing brace alone": "}",
        "trailing comma": with_action('{"type": "terminate"},'),
        "trailing comma, inner": with_action('{"type": "terminate",}'),
        "leading comma": "{," + ANSWER[1:],
        "comment": "{/* no */" + ANSWER[1:],
        "single quotes": ANSWER.replace('"', "'"),
        "bare key": ANSWER.replace('"rationale"', "rationale"),
        "number as key": "{1: 2}",
        "no colon": ANSWER.replace(":", "", 1),
        "no comma": ANSWER.replace(",", "", 1),
        "semicolon for a comma": ANSWER.replace(",", ";", 1),
        "semicolon for a comma, inner": with_type('"click"; "name": "a"'),
        "equals sign for a colon": ANSWER.replace(":", "=", 1),
        "no value": with_extra(""),
        "python literal": with_extra("None"),
        "unknown escape": with_rationale(r'"\x41"'),
        "short unicode escape": with_rationale(r'"\u12"'),
        "signed unicode escape": with_rationale(r'"\u+123"'),
        "leading zero": with_extra("01"),
        "leading plus": with_extra("+1"),
        "bare fraction": with_extra(".5"),
        "open fraction": with_extra("1."),
        "open exponent": with_extra("1e"),
        "minus alone": with_extra("-"),
        "hexadecimal": with_extra("0x1F"),
        "full-width digit": with_extra("１"),
        "mismatched brackets": with_extra("[}"),
        "space that JSON does not know": with_extra("\u00a01"),
        "unclosed string": '{"rationale": "why',
        "backslash at the end": '{"rationale": "why\\',
    },
    FormatError.NOT_AN_OBJECT: {
        "null": "null",
        "boolean": "true",
        "number": "1",
        "5,000 digits": "1" * 5000,
        "string": '"why"',
        "string with a brace": '"{"',
        "list": "[]",
        "answer in a list": f"[{ANSWER}]",
    },
    FormatError.EXTRA_TEXT: {
        "before": f"Sure! {ANSWER}",
        "after": f"{ANSWER} Done.",
        "comma after": f"{ANSWER},",
        "brace after": ANSWER + "}",
        "deep nesting after": ANSWER + "[" * 100,
        "second answer": ANSWER + ANSWER,
        "value before": f"null {ANSWER}",
        "list before": f"[] {ANSWER}",
        "two values": "1 2",
        "fence": f"```json\n{ANSWER}\n```",
        "fence, no language": f"```\n{ANSWER}\n```",
        "thoughts": f"<think>hm</think>{ANSWER}",
        "byte order mark": "\ufeff" + ANSWER,
        "no-break space after": ANSWER + "\u00a0",
        "half a surrogate pair before": "\ud800" + ANSWER,
        "end token in front": f"<|im_end|>{ANSWER}",
    },
    FormatError.DUPLICATE_KEY: {
        "rationale": '{"rationale": "a", "rationale": "b", "action": {"type": "terminate"}}',
        "same value": '{"rationale": "a", "rationale": "a", "action": {"type": "terminate"}}',
        "action": with_action('{"type": "terminate"}, "action": {"type": "terminate"}'),
        "type": with_type('"click", "type": "terminate"'),
        "attribute": with_type('"click", "name": "a", "name": "b"'),
        "extra": with_extra('1, "extra": 1'),
        "nested": with_extra('{"a": {"b": 1, "b": 2}}'),
        "in a list": with_extra('[{"a": 1, "a": 2}]'),
        "one escaped": with_extra(r'{"a": 1, "\u0061": 2}'),
        "empty": with_extra('{"": 1, "": 2}'),
    },
    FormatError.NON_FINITE_NUMBER: {
        f"{name}, {where}": place(name)
        for name in ("NaN", "Infinity", "-Infinity")
        for where, place in PLACES.items()
    },
    FormatError.TOO_DEEP: {
        # The outer object is the first level.
        "one list too many": with_extra(lists(MAX_DEPTH)),
        "one object too many": with_extra(objects(MAX_DEPTH)),
        "10,000 lists": with_extra(lists(10_000)),
        "10,000 objects": with_extra(objects(10_000)),
        "10,000 lists, rationale": with_rationale(lists(10_000)),
        "10,000 objects, action": with_action(objects(10_000)),
        "10,000 objects, attribute": with_type(f'"click", "name": {objects(10_000)}'),
        "10,000 lists alone": lists(10_000),
        "never closed": with_extra("[" * 10_000),
        "never closed, objects": '{"a":' * 10_000,
    },
    FormatError.LONE_SURROGATE: {
        "raw high": with_rationale('"\ud83d"'),
        "raw low": with_rationale('"\ude00"'),
        "escaped high": with_rationale(r'"\ud83d"'),
        "escaped low": with_rationale(r'"\uDE00"'),
        "wrong way round": with_rationale(r'"\ude00\ud83d"'),
        "high before text": with_rationale(r'"\ud83d\u0041"'),
        "raw, then escaped": with_rationale('"\ud83d\\ude00"'),
        "escaped, then raw": with_rationale('"\\ud83d\ude00"'),
        "two raw halves": with_rationale('"\ud83d\ude00"'),
        "type": with_type(r'"\ud83d"'),
        "attribute": with_type(r'"click", "name": "\ud83d"'),
        "extra": with_extra(r'"\ud83d"'),
        "nested": with_extra(r'[{"a": ["\ud83d"]}]'),
        "key": with_extra(r'1, "\ud83d": 1'),
        "raw key": with_extra('1, "\ud83d": 1'),
        "attribute key": with_type(r'"click", "\ud83d": "a"'),
        "nested key": with_extra(r'[{"\ud83d": 1}]'),
    },
    FormatError.MISSING_RATIONALE: {
        "no key": "{}",
        "only action": '{"action": {"type": "terminate"}}',
        "other case": ANSWER.replace("rationale", "Rationale"),
        "only nested": '{"action": {"type": "terminate", "rationale": "r"}}',
    },
    FormatError.MISSING_ACTION: {
        "only rationale": '{"rationale": "r"}',
        "flat": '{"rationale": "r", "type": "terminate"}',
    },
    FormatError.MISSING_ACTION_TYPE: {
        "empty action": with_action("{}"),
        "only name": with_action('{"name": "buy_now"}'),
        "type outside": with_action('{}, "type": "terminate"'),
    },
    FormatError.WRONG_TYPE: {
        **{
            f"rationale {written}": with_rationale(written)
            for written in ("null", "true", "false", "1", "1.5", "[]", '["r"]', "{}", "1" * 5000)
        },
        **{
            f"action {written}": with_action(written)
            for written in ("null", "true", "1", '"terminate"', "[]", '[{"type": "terminate"}]')
        },
        **{
            f"type {written}": with_type(written)
            for written in ("null", "false", "0", "[]", '["terminate"]', "{}")
        },
    },
}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        pytest.param(text, error, id=f"{error}-{name[:40]}")
        for error, texts in REFUSED.items()
        for name, text in texts.items()
    ],
)
def test_strict_names_what_is_wrong(text: str, error: FormatError) -> None:
    assert refused(parse_strict(text)).error is error


def test_every_error_is_tested() -> None:
    elsewhere = {
        FormatError.NO_OBJECT,  # tolerant reading, below
        # test_actions.py
        FormatError.UNKNOWN_ACTION_TYPE,
        FormatError.MISSING_ATTRIBUTE,
        FormatError.EXTRA_KEY,
    }
    assert set(FormatError) == REFUSED.keys() | elsewhere


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the completion is empty"),
        ("[]", "the completion is JSON, but not an object"),
        (f"Sure! {ANSWER}", "text before the object"),
        (f" {ANSWER} Bye", f"text after the object, at character {len(ANSWER) + 1}"),
        ('{"a" 1}', "Expecting ':' at character 5"),
        (with_extra('1, "extra": 1'), "key 'extra' occurs twice"),
        (with_extra("-Infinity"), "-Infinity is not a JSON number"),
        ("[" * 100, f"nested deeper than {MAX_DEPTH} levels at character {MAX_DEPTH}"),
        (with_rationale(r'"\ud83d"'), "half a surrogate pair (U+D83D)"),
        ("{}", "rationale is missing"),
        (with_action("{}"), "action.type is missing"),
        (with_rationale("null"), "rationale must be a string, not null"),
        (with_rationale("5"), "rationale must be a string, not a number"),
        (with_rationale("true"), "rationale must be a string, not a boolean"),
        (with_action('"click"'), "action must be an object, not a string"),
        (with_action("[]"), "action must be an object, not a list"),
        (with_type("{}"), "action.type must be a string, not an object"),
    ],
)
def test_message_has_error_and_position(text: str, message: str) -> None:
    assert refused(parse_strict(text)).message == message


@pytest.mark.parametrize("end", range(1, len(ANSWER)))
def test_every_cut_answer_is_invalid(end: int) -> None:
    assert verdict(parse_strict(ANSWER[:end])) is FormatError.INVALID_JSON


@pytest.mark.parametrize("control", [chr(code) for code in range(0x20)], ids=lambda c: f"U+{ord(c):04X}")
def test_raw_control_characters_are_refused_in_keys_and_values(control: str) -> None:
    assert verdict(parse_strict(with_rationale(f'"a{control}b"'))) is FormatError.INVALID_JSON
    assert verdict(parse_strict(with_extra(f'1, "a{control}b": 1'))) is FormatError.INVALID_JSON
    assert verdict(parse_strict(with_extra(f'{{"a{control}b": 1}}'))) is FormatError.INVALID_JSON


# --- accepted ---------------------------------------------------------------------------------------


class Case(NamedTuple):
    text: str
    written: str
    """The rationale as written in the text."""
    rationale: str


ACCEPTED: dict[str, Case] = {
    "plain": Case(ANSWER, "why", "why"),
    "other key order": Case('{"action": {"name": "a", "type": "click"}, "rationale": "why"}', "why", "why"),
    "no spaces": Case('{"rationale":"why","action":{"type":"terminate"}}', "why", "why"),
    "spaces everywhere": Case(
        ' \n{\t"rationale" :\r"why"\n,\n"action" : { "type" : "terminate" } } ', "why", "why"
    ),
    "empty rationale": Case(with_rationale('""'), "", ""),
    "short escapes": Case(with_rationale(r'"\"\\\/\b\f\n\r\t"'), r"\"\\\/\b\f\n\r\t", '"\\/\b\f\n\r\t'),
    "escaped quote at the end": Case(with_rationale(r'"so \"it\""'), r"so \"it\"", 'so "it"'),
    "unicode escapes": Case(with_rationale(r'"\u00e9\u00E9"'), r"\u00e9\u00E9", "éé"),
    "escaped surrogate pair": Case(with_rationale(r'"\ud83d\ude00"'), r"\ud83d\ude00", "😀"),
    "escaped NUL": Case(with_rationale(r'"\u0000"'), r"\u0000", "\0"),
    "astral": Case(with_rationale('"😀𝄞"'), "😀𝄞", "😀𝄞"),
    "DEL, C1 and line separators may be raw": Case(
        with_rationale('"\x7f\x85\u2028\u2029"'), "\x7f\x85\u2028\u2029", "\x7f\x85\u2028\u2029"
    ),
    "brackets in strings are no nesting": Case(
        with_rationale('"' + "[{" * 500 + '"'), "[{" * 500, "[{" * 500
    ),
    "brackets behind an escaped quote": Case(
        with_rationale(r'"\"' + "[" * 500 + '"'), r"\"" + "[" * 500, '"' + "[" * 500
    ),
    "deepest lists": Case(with_extra(lists(MAX_DEPTH - 1)), "r", "r"),
    "deepest objects": Case(with_extra(objects(MAX_DEPTH - 1)), "r", "r"),
    "5,000-digit integer": Case(with_extra("-" + "9" * 5000), "r", "r"),
    "float beyond the largest": Case(with_extra("1e999"), "r", "r"),
    "same key at two levels": Case(with_extra('{"rationale": 1, "extra": {"extra": 2}}'), "r", "r"),
    "escaped key": Case(r'{"\u0072ationale": "why", "action": {"ty\u0070e": "terminate"}}', "why", "why"),
}


@PARSERS
@pytest.mark.parametrize("case", ACCEPTED.values(), ids=list(ACCEPTED))
def test_accepted(case: Case, parse: Parser) -> None:
    envelope = accepted(parse(case.text))
    assert envelope.rationale == case.rationale
    assert case.text[slice(*envelope.rationale_span)] == case.written


def test_envelope_keeps_what_it_read() -> None:
    text = '{"b": 1, "action": {"x": [1], "type": "click", "name": null}, "a": {}, "rationale": "why"}'
    assert accepted(parse_strict(text)) == Envelope(
        rationale="why",
        rationale_span=accepted(parse_strict(text)).rationale_span,
        action_type="click",
        fields={"x": [1.0], "name": None},
        extra_keys=("b", "a"),
    )


def test_results_are_frozen() -> None:
    with pytest.raises(AttributeError):
        accepted(parse_strict(ANSWER)).rationale = ""  # type: ignore[misc]
    with pytest.raises(AttributeError):
        refused(parse_strict("")).message = ""  # type: ignore[misc]


@PARSERS
@pytest.mark.parametrize(
    "end",
    ["", " \n", "<|im_end|>", "<|im_end|>\n", "\n<|im_end|> <|endoftext|><|endoftext|>\t", "<|endoftext|>"],
)
def test_end_tokens_and_white_space_at_the_end_do_not_count(parse: Any, end: str) -> None:
    assert accepted(parse(ANSWER + end, END_TOKENS)) == accepted(parse(ANSWER))


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("<|im_end|>", ""),
        ("a<|im_end|>b", "a<|im_end|>b"),  # only at the end
        ("a<|im_end|", "a<|im_end|"),
        ("a<|im_end|>\u00a0", "a<|im_end|>\u00a0"),  # white space is JSON's
        ("  a", "  a"),  # positions stay
    ],
)
def test_strip_end(text: str, stripped: str) -> None:
    assert strip_end(text, END_TOKENS) == stripped


@PARSERS
def test_only_end_tokens_is_empty(parse: Any) -> None:
    assert verdict(parse(" <|im_end|>\n", END_TOKENS)) is FormatError.EMPTY


def test_end_tokens_must_be_named() -> None:
    assert verdict(parse_strict(ANSWER + "<|im_end|>")) is FormatError.EXTRA_TEXT


# --- the caller's stack -----------------------------------------------------------------------------

DEEP = {
    "deepest": with_extra(lists(MAX_DEPTH - 1)),
    "deepest objects": with_extra(objects(MAX_DEPTH - 1)),
    "too deep": with_extra(lists(MAX_DEPTH)),
    "far too deep": with_extra(lists(2000)),
    "far too deep, objects": with_extra(objects(2000)),
}


def call_with_frames_left(frames: int, call: Callable[[], object]) -> object:
    """Call from so deep a stack that only `frames` more fit below the recursion limit."""

    def descend(frames_to_go: int) -> object:
        return call() if frames_to_go <= 0 else descend(frames_to_go - 1)

    frame, depth = sys._getframe(), 0
    while frame := frame.f_back:  # type: ignore[assignment]
        depth += 1
    return descend(sys.getrecursionlimit() - depth - frames)


@PARSERS
@pytest.mark.parametrize("text", DEEP.values(), ids=list(DEEP))
def test_verdict_does_not_depend_on_the_stack(text: str, parse: Parser) -> None:
    assert call_with_frames_left(3 * MAX_DEPTH, lambda: parse(text)) == parse(text)


@PARSERS
@pytest.mark.parametrize("text", DEEP.values(), ids=list(DEEP))
def test_exhausted_stack_is_an_error_and_no_verdict(text: str, parse: Parser) -> None:
    verdicts: list[object] = []
    for frames in range(10, 3 * MAX_DEPTH):
        try:
            verdicts.append(call_with_frames_left(frames, lambda: parse(text)))
        except RecursionError:
            continue
    assert verdicts
    assert all(verdict == parse(text) for verdict in verdicts)


# --- tolerant reading -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("```json\n", "\n```"),
        ("```\n", "\n```"),
        ("Sure! ", " Done."),
        ("<think>{hm} {</think>", ""),
        ('{"a": 1} ', ""),
        ("[", "]"),
        ('} ] " ', ""),
        ("", ANSWER.replace("why", "later")),
        ("{", ""),
        ("{" * 10 + " ", ""),
        ("", "[" * 100),
        (with_extra("NaN") + " ", ""),
        (with_rationale("null") + " ", ""),
        (with_rationale(r'"\ud800"') + " ", ""),
        (objects(MAX_DEPTH + 1) + " ", ""),
        ("\ud800\ufeff", "\udfff"),
        ("{}" * 1000, ""),
        # Quotes that are not closed, in every number
        ('{"', ""),
        ('{"a": "{" ', ""),
        ('He said "buy {this}: ', ""),
        ('5" {', '"'),
        ('{"x": {"y": "', ""),
        ("{'a': 'it\"s'} ", ""),
        ('{\\"rationale\\": \\"x\\"} ', ""),
        # An answer inside of another object
        ('{"result": ', "}"),
        ('{"result": {"answers": [', "]}}"),
        ('{"a": 1, "a": 2, "b": ', "}"),
        ('{"a": NaN, "b": ', ""),
        ('{"rationale": "r", "action": ', "}"),
        ('{"a":' * (MAX_DEPTH + 9), "}" * (MAX_DEPTH + 9)),
        ("[" * 100, "]" * 100),
    ],
)
def test_tolerant_reads_past_what_surrounds_the_answer(before: str, after: str) -> None:
    text = before + ANSWER + after
    envelope = accepted(parse_tolerant(text))
    assert envelope.rationale_span.start == len(before) + ANSWER.index("why")
    assert text[slice(*envelope.rationale_span)] == envelope.rationale == "why"
    assert isinstance(parse_strict(text), FormatFailure)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", FormatError.EMPTY),
        (" \n", FormatError.EMPTY),
        ("Sure!", FormatError.NO_OBJECT),
        ("null", FormatError.NO_OBJECT),
        ("[NaN]", FormatError.NO_OBJECT),
        ("}", FormatError.NO_OBJECT),
        ("{", FormatError.INVALID_JSON),
        ("Sure! {x}", FormatError.INVALID_JSON),
        # Of several flawed objects the first counts.
        ('{"a": 1} {x}', FormatError.MISSING_RATIONALE),
        ('{x} {"a": 1}', FormatError.INVALID_JSON),
        (f'{{"a": {ANSWER[:-1]}', FormatError.INVALID_JSON),
        (f"[{with_extra('NaN')}]", FormatError.NON_FINITE_NUMBER),
        ("```\n" + with_rationale("null") + "\n```", FormatError.WRONG_TYPE),
        ("{}" * 100, FormatError.MISSING_RATIONALE),
    ],
)
def test_tolerant_names_what_is_wrong(text: str, error: FormatError) -> None:
    assert refused(parse_tolerant(text)).error is error


# --- which one of several ---------------------------------------------------------------------------


def saying(word: str) -> str:
    return ANSWER.replace("why", word)


NESTED = f'{{"rationale": "outer", "action": {{"type": "terminate"}}, "draft": {saying("inner")}}}'


@pytest.mark.parametrize(
    ("text", "first", "last", "after_thinking"),
    [
        (saying("a"), "a", "a", "a"),
        (saying("a") + saying("b") + " {x}", "a", "b", "a"),
        # An answer inside an answer is a part of it.
        (NESTED, "outer", "outer", "outer"),
        (f"{saying('a')} {NESTED}", "a", "outer", "a"),
        (f"<think>{saying('a')}</think>{saying('b')} or {saying('c')}", "a", "c", "b"),
        # Where the prompt opens the thinking
        (f"{saying('a')}</think>{saying('b')}", "a", "b", "b"),
        (f"{saying('a')}</think>{saying('b')}</think>{saying('c')}", "a", "c", "c"),
        (f"{saying('a')}<think>never closed {saying('b')}", "a", "b", "a"),
        # Marks in a value are no marks.
        (f"<think>hm</think>{saying('a </think> b')}", "a </think> b", "a </think> b", "a </think> b"),
        (saying("<think>"), "<think>", "<think>", "<think>"),
    ],
)
def test_which(text: str, first: str, last: str, after_thinking: str) -> None:
    expected = {Which.FIRST: first, Which.LAST: last, Which.AFTER_THINKING: after_thinking}
    for which, rationale in expected.items():
        envelope = accepted(parse_tolerant(text, (), which))
        assert envelope.rationale == rationale
        assert text[slice(*envelope.rationale_span)] == rationale


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            f"<think>{ANSWER}",
            FormatError.NO_OBJECT,
            "no JSON object in the completion before <think>, which is never closed",
        ),
        (f"<think>{ANSWER}</think> Done.", FormatError.NO_OBJECT, "no JSON object in the completion"),
        ("<think>{x}</think> {}", FormatError.MISSING_RATIONALE, "rationale is missing"),
        ("", FormatError.EMPTY, "no JSON object in the completion"),
    ],
)
def test_no_answer_after_thinking(text: str, error: FormatError, message: str) -> None:
    assert refused(parse_tolerant(text, (), Which.AFTER_THINKING)) == FormatFailure(error, message)


def test_an_answer_that_the_check_refuses_is_passed_over() -> None:
    def check(envelope: Envelope) -> FormatFailure | None:
        is_bad = envelope.rationale == "bad"
        return FormatFailure(FormatError.WRONG_TYPE, "bad") if is_bad else None

    text = f"{saying('bad')} {saying('good')} {saying('bad')}"
    for which in Which:
        assert accepted(parse_tolerant(text, (), which, check)).rationale == "good"
        assert refused(parse_tolerant(saying("bad"), (), which, check)).message == "bad"


# --- hostile text -----------------------------------------------------------------------------------

CHAIN = '{"rationale": "", "action": {}, "x": '  # looks like an answer, and is none

HOSTILE: dict[str, Callable[[int], str]] = {
    '"\\': lambda n: '"\\' * n,
    '{"\\': lambda n: '{"\\' * n,
    'one brace, "\\': lambda n: "{" + '"\\' * n,
    "{": lambda n: "{" * n,
    '{"': lambda n: '{"' * n,
    '{"a":': lambda n: '{"a":' * n,
    "{x}": lambda n: "{x}" * n,
    "{}": lambda n: "{}" * n,
    '{"a":1}': lambda n: '{"a":1}' * n,
    '{"a":NaN}': lambda n: '{"a":NaN}' * n,
    '{"a":NaN, far from closed': lambda n: '{"a":NaN,' * n,
    "[{": lambda n: "[{" * n,
    "open string": lambda n: '{"rationale": "' + "a" * n,
    "open strings": lambda n: '{"rationale": "' * n,
    "spaces": lambda n: "{" + " " * n + "x",
    "spaces after each string": lambda n: ('{"a"' + " " * 50) * (n // 50),
    "spaces at the end": lambda n: "{" + " " * n,
    "end tokens": lambda n: "{" + "<|im_end|> " * n,
    "million digits": lambda n: '{"a": ' + "1" * 10 * n,
    "no answers": lambda n: (CHAIN + "1}") * (n // 10),
    "no answers, nested": lambda n: CHAIN * (n // 10) + "1" + "}" * (n // 10),
    "no answers, nested as deep as possible": lambda n: (CHAIN * 60 + "1" + "}" * 60) * (n // 600),
    "no answers, never closed": lambda n: CHAIN * (n // 10),
    "no answers, and a long string": lambda n: CHAIN * 60 + '"' + "a" * n + '"' + "}" * 60,
    "a brace in every string": lambda n: '{"{":"{",' * n,
    "no answers, for their syntax": lambda n: '{"rationale":x,"action":1}' * (n // 26),
    "no answers, for their syntax, nested": lambda n: '{"action":"","rationale":' * (n // 9) + "}" * (n // 9),
    "thinking": lambda n: "<think>{</think>" * n,
}
PER_PLACE = pytest.mark.parametrize("hostile", HOSTILE.values(), ids=list(HOSTILE))


@PARSERS
@PER_PLACE
def test_hostile_text_is_refused(hostile: Callable[[int], str], parse: Any) -> None:
    assert refused(parse(hostile(20_000), END_TOKENS)).error in FormatError


def work(text: str, which: Which, monkeypatch: pytest.MonkeyPatch) -> int:
    """Lines of Python that run, and characters that are given to compiled code."""
    counted = 0
    scan, pattern = scan_members, CountingPattern(json_objects._LEXEME)

    def count_lines(frame: Any, event: str, argument: object) -> Any:
        nonlocal counted
        counted += event == "line" and "shopr1_rewards" in frame.f_code.co_filename
        return count_lines

    def counting_scan(text: str, start: int) -> Any:
        nonlocal counted
        try:
            values, spans, end = scan(text, start)
        except json.JSONDecodeError as error:
            counted += error.pos - start + error.pos  # `json` counts the lines before an error
            raise
        counted += end - start
        return values, spans, end

    with monkeypatch.context() as patched:
        patched.setattr(completion, "scan_members", counting_scan)
        patched.setattr(json_objects, "_LEXEME", pattern)
        sys.settrace(count_lines)
        try:
            parse_tolerant(text, (), which)
        finally:
            sys.settrace(None)
    return counted + pattern.num_chars


@pytest.mark.parametrize("which", Which)
@PER_PLACE
def test_work_is_linear_in_hostile_text(
    hostile: Callable[[int], str], which: Which, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Twice as long a text may take twice as much work: counted, not timed. Quadratic work would be 4.
    short, long = (work(hostile(n), which, monkeypatch) for n in (3000, 6000))
    assert long <= 2.2 * short + 1000


# --- properties -------------------------------------------------------------------------------------

TEXT = st.text()  # without surrogates
ANY_TEXT = st.text(st.characters(exclude_categories=()))  # with
KEYS = st.sampled_from(["rationale", "action", "type", "name", ""]) | st.text(max_size=3)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)


def json_values(text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        SCALARS | text,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
        max_leaves=6,
    )


class Written(NamedTuple):
    text: str
    rationale: str


@st.composite
def answers(draw: st.DrawFn, text: st.SearchStrategy[str]) -> Written:
    """Valid answers, but for half surrogate pairs that `text` may bring in."""
    values = json_values(text)
    members = draw(st.dictionaries(KEYS, values, max_size=3))
    members["rationale"] = draw(text)
    action = {**draw(st.dictionaries(KEYS, values, max_size=3)), "type": draw(text)}
    members["action"] = dict(draw(st.permutations(list(action.items()))))
    written = json.dumps(
        dict(draw(st.permutations(list(members.items())))),
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 0, 2, "\t"])),
        separators=draw(st.sampled_from([None, (",", ":"), (" ,\n", "\r:\t")])),
    )
    space = st.text(" \t\n\r", max_size=3)
    return Written(draw(space) + written + draw(space), members["rationale"])


@given(answers(TEXT))
def test_span_holds_the_rationale(written: Written) -> None:
    envelope = accepted(parse_strict(written.text))
    assert json.loads(f'"{written.text[slice(*envelope.rationale_span)]}"') == written.rationale
    assert envelope.rationale == written.rationale


SHORT_ESCAPES = {
    '"': r"\"",
    "\\": r"\\",
    "/": r"\/",
    "\b": r"\b",
    "\f": r"\f",
    "\n": r"\n",
    "\r": r"\r",
    "\t": r"\t",
}


def as_units(char: str) -> str:
    units = char.encode("utf-16-be").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def written_char(char: str, how: str) -> str:
    if how == "raw" and char >= " " and char not in '"\\':
        return char
    if how == "short" and char in SHORT_ESCAPES:
        return SHORT_ESCAPES[char]
    return as_units(char).upper().replace("U", "u") if how == "upper" else as_units(char)


@given(
    st.lists(
        st.tuples(
            st.characters(exclude_categories=["Cs"]), st.sampled_from(["raw", "short", "lower", "upper"])
        )
    )
)
def test_span_holds_the_rationale_however_its_characters_are_escaped(chars: list[tuple[str, str]]) -> None:
    content = "".join(written_char(*char) for char in chars)
    text = with_rationale(f'"{content}"')
    envelope = accepted(parse_strict(text))
    assert text[slice(*envelope.rationale_span)] == content
    assert envelope.rationale == "".join(char for char, _ in chars)


class Pairs(list[tuple[str, Any]]):
    """An object as the oracle keeps it, duplicates and all."""


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _is_sound(value: Any, depth: int = 1) -> bool:
    if isinstance(value, str):
        return not any("\ud800" <= char <= "\udfff" for char in value)
    if not isinstance(value, list):
        return True
    if isinstance(value, Pairs):
        keys = [key for key, _ in value]
        if len(set(keys)) < len(keys):
            return False
        value = keys + [member for _, member in value]
    return depth <= MAX_DEPTH and all(_is_sound(item, depth + 1) for item in value)


def is_valid(text: str) -> bool:
    """The same question, answered the slow way."""
    try:
        value = json.loads(text, object_pairs_hook=Pairs, parse_constant=_refuse)
    except ValueError:
        return False
    if not isinstance(value, Pairs) or not _is_sound(value):
        return False
    members = dict(value)
    action = members.get("action")
    return (
        isinstance(members.get("rationale"), str)
        and isinstance(action, Pairs)
        and isinstance(dict(action).get("type"), str)
    )


SNIPPETS = st.characters(exclude_categories=()) | st.sampled_from(
    [
        *'{}[]",:\\ \n\t\x00-+.0e',
        *("NaN", "-Infinity", "null", "1e999", "{}", "[[]]", "```"),
        *("\\ud800", "\\u00e9", "\ud800"),
        *('"rationale":', '"action":{', '"type":"x",', '"x":1,', ',"x":"'),
    ]
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    text = draw(answers(ANY_TEXT)).text
    for _ in range(draw(st.integers(0, 3))):
        i, j = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        j = min(j, i + draw(st.sampled_from([1, 2, 8, 100])))
        match draw(st.sampled_from(["delete", "insert", "replace", "duplicate"])):
            case "delete":
                text = text[:i] + text[j:]
            case "insert":
                text = text[:i] + draw(SNIPPETS) + text[i:]
            case "replace":
                text = text[:i] + draw(SNIPPETS) + text[i + 1 :]
            case "duplicate":
                text = text[:j] + text[i:j] + text[j:]
    return text


@given(mutated() | ANY_TEXT)
@example(ANSWER)
@example("{" * 50 + "}" * 50)
def test_strict_accepts_what_a_slow_oracle_accepts(text: str) -> None:
    assert isinstance(parse_strict(text), Envelope) == is_valid(text)


@given(mutated() | ANY_TEXT)
def test_tolerant_reads_what_strict_reads(text: str) -> None:
    strict, tolerant = parse_strict(text), parse_tolerant(text)
    assert tolerant == strict or isinstance(strict, FormatFailure)


def first_answer(text: str) -> int | None:
    """Position of the first valid answer, found by trying every brace."""
    decoder = json.JSONDecoder(object_pairs_hook=Pairs, parse_constant=_refuse)
    for start in (i for i, char in enumerate(text) if char == "{"):
        try:
            _, end = decoder.raw_decode(text, start)
        except ValueError:
            continue
        if is_valid(text[start:end]):
            return start
    return None


QUOTED = st.sampled_from(
    ['{"', '"', "\\", '\\"', '{"a": ', "}", "[", '{"rationale": ', '", "action": {', "why"]
)
MESSY = st.lists(mutated() | QUOTED | answers(TEXT).map(lambda written: written.text), max_size=5).map(
    "".join
)


@given(MESSY)
def test_tolerant_finds_the_first_answer_that_a_search_from_every_brace_finds(text: str) -> None:
    result, start = parse_tolerant(text), first_answer(text)
    assert isinstance(result, Envelope) == (start is not None)
    if isinstance(result, Envelope) and start is not None:
        members, _ = json.JSONDecoder(strict=True).raw_decode(text, start)
        assert result.rationale == members["rationale"]
        assert result.rationale_span.start > start


@given(MESSY)
def test_every_choice_finds_an_answer_or_none(text: str) -> None:
    first, last, after = (parse_tolerant(text, (), which) for which in Which)
    assert isinstance(first, Envelope) == isinstance(last, Envelope)
    if isinstance(first, Envelope) and isinstance(last, Envelope):
        assert first.rationale_span <= last.rationale_span
    if "think>" not in text:
        assert after == first


@given(answers(TEXT), ANY_TEXT.filter(lambda text: "{" not in text), ANY_TEXT)
def test_tolerant_reads_past_any_text_without_a_brace(written: Written, before: str, after: str) -> None:
    envelope = accepted(parse_tolerant(before + written.text + after))
    alone = accepted(parse_strict(written.text))
    assert envelope.rationale_span.start == alone.rationale_span.start + len(before)
    assert (envelope.rationale, envelope.fields) == (alone.rationale, alone.fields)


@given(answers(TEXT), st.lists(st.sampled_from([*END_TOKENS, " ", "\n"])))
def test_any_end_is_stripped(written: Written, end: list[str]) -> None:
    assert parse_strict(written.text + "".join(end), END_TOKENS) == parse_strict(written.text)


@given(mutated() | answers(ANY_TEXT).map(lambda written: written.text))
def test_the_usual_form_is_read_like_any_other(text: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(completion, "_usual_envelope", lambda _text, _start: None)
        member_by_member = parse_strict(text, END_TOKENS)
    assert parse_strict(text, END_TOKENS) == member_by_member
