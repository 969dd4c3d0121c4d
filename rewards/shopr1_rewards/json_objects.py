"""Positions of JSON objects in any text, in linear time.

Whether a brace begins an object depends on the quotes before it, which may be unbalanced. So the text is read
again from every brace that has not been read as a bracket, because it was inside a string of the readings so
far. No character is read more than twice: of two readings of a character one is inside a string and the other
is not, and each quote swaps them. A backslash outside of strings ends a reading.
"""

import re
from collections.abc import Set as AbstractSet
from json.decoder import scanstring  # type: ignore[attr-defined]  # the C scanner; typeshed leaves it out

from shopr1_rewards.strict_json import Span

# A closed string, with the colon after it if it is a key, or a single character. Others are skipped.
_LEXEME = re.compile(r'("[^"\\]*+(?:\\.[^"\\]*+)*+")(?:[ \t\n\r]*+(:))?|[{}\[\]"\\]', re.DOTALL)
_PAIRS = {"}": "{", "]": "["}


def object_spans(text: str, keys: AbstractSet[str]) -> list[Span]:
    """Every span whose brackets and quotes match as those of an object, and that has all these keys.

    Ordered by their beginnings; they may be nested. Anything else about JSON is not checked.
    """
    ends: dict[int, int] = {}
    read: set[int] = set()
    start = text.find("{")
    while start != -1:
        if start not in read:
            _read(text, start, keys, read, ends)
        start = text.find("{", start + 1)
    return [Span(start, ends[start]) for start in sorted(ends)]


def _read(text: str, start: int, keys: AbstractSet[str], read: set[int], ends: dict[int, int]) -> None:
    """Read from `start` until its object ends or a bracket does not match.

    Args:
        read: gets the positions of all braces that were read as brackets.
        ends: gets the ends of the objects that have the keys.
    """
    containers: list[tuple[str, int, set[str]]] = []  # bracket, position, and which of the keys it has
    for match in _LEXEME.finditer(text, start):
        char = text[match.start()]
        if match[1]:
            if match[2] and (key := _key(match[1])) in keys:
                containers[-1][2].add(key)
        elif char in "{[":
            containers.append((char, match.start(), set()))
            if char == "{":
                read.add(match.start())
        elif containers[-1][0] == _PAIRS.get(char):
            bracket, begin, own_keys = containers.pop()
            if bracket == "{" and own_keys == keys:
                ends[begin] = match.end()
            if not containers:
                return
        else:  # not its bracket, an open string, or a backslash
            return


def _key(quoted: str) -> str:
    try:
        return scanstring(quoted, 1, True)[0] if "\\" in quoted else quoted[1:-1]
    except ValueError:  # an escape that JSON does not have
        return ""
