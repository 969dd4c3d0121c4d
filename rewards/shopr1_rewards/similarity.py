r"""Similarity of two attribute values: ROUGE-L F1 (Lin 2004) over a declared tokenisation.

    ROUGE-L F1(x, y) = 2 · LCS(x, y) / (|x| + |y|)        in [0, 1]; 0 if either has no token

LCS is the length of the longest common subsequence of tokens, |·| the number of tokens. This is the
harmonic mean of LCS/|x| and LCS/|y|, rounded once. Shop-R1 names ROUGE-L but not its tokens, and the
tokens decide: `button_list.white` against `button_list.black` is 0 when a name is one token.

The default tokens of a value that has letters or digits are its words. A value without any, such as `+` or
`★★★★☆`, is one token. Symbols that mean letters or digits (`™`, `½`, `²`, `㎏`) can be read in two ways,
and the one with the larger F1 counts for both values:

    as what they mean    `1½ cups` is `1 1/2 cups`, `500㎖` is `500ml`
    as separators        `Nike™` is `Nike`, as for Google's `rouge_score`, which drops what is not ASCII

Hence F1(x, x) = 1 for every x but the empty string, and where all letters and digits are ASCII, F1 is at
least that of `rouge_score`. On ASCII it is equal, unless both values have neither letters nor digits:
Google's is 0 then.

Tokenising is linear in the characters. LCS takes one step per token of the predicted value, on integers with
one bit per token of the true one, which `ground_truth.py` bounds. Every step is short, so that other threads
of the interpreter can run in between.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import lru_cache
from itertools import groupby
from typing import Literal

_ASCII_WORD = re.compile(r"[a-z0-9]+")
_SHORT = 256
"""Characters whose quadratic time is less than that of sorting them well."""
_DECOMPOSITIONS: dict[str, Literal["NFD", "NFKD"]] = {"NFC": "NFD", "NFKC": "NFKD"}

# Scripts without spaces between words, in which every character is a token: the Unicode blocks Thai, Lao,
# Tibetan, Myanmar, Khmer, Kana and the Han ideographs with their extensions.
_UNSPACED_RANGES = (
    (0x0E00, 0x0FFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x2E80, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
_SYMBOL_RANGES = ((0x2000, 0x2BFF), (0x1F000, 0x1FFFF))
# Marks that cannot be seen: the grapheme joiner and variation selectors, such as those of emoji.
_INVISIBLE_MARKS = ((0x034F, 0x034F), (0x180B, 0x180F), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF))


class Tokenizer(StrEnum):
    """Tokenisation of attribute values for ROUGE-L."""

    UNICODE = "unicode"
    """Case-folded words of any script; Han, Kana, Thai … by character. As `rouge_score` on ASCII words."""
    ROUGE_SCORE = "rouge_score"
    """Google's `rouge_score` without stemming: runs of a-z and 0-9. Drops every other script."""
    WHITESPACE = "whitespace"
    """Split at white space, with case and punctuation. White space alone is one token."""
    EXACT = "exact"
    """The whole value is one token: 1 if equal, else 0."""


class _CharKind(StrEnum):
    WORD = "word"
    SINGLE = "single"
    MARK = "mark"
    IGNORED = "ignored"
    BREAK = "break"


@lru_cache(maxsize=8192)
def _char_kind(char: str) -> _CharKind:
    category, point = unicodedata.category(char), ord(char)
    # Zero-width spaces and joiners, soft hyphens, variation selectors: copied, never intended.
    if category == "Cf" or _is_in(point, _INVISIBLE_MARKS):
        return _CharKind.IGNORED
    if category in ("Mn", "Mc"):
        return _CharKind.MARK
    if category[0] not in "LN":
        return _CharKind.BREAK
    return _CharKind.SINGLE if _is_in(point, _UNSPACED_RANGES) else _CharKind.WORD


def _is_in(point: int, ranges: Sequence[tuple[int, int]]) -> bool:
    return any(first <= point <= last for first, last in ranges)


def _words(text: str) -> list[str]:
    if text.isascii():
        return _rouge_score_tokens(text)
    tokens: list[list[str]] = []
    last = _CharKind.BREAK
    for char in _folded(_space_numbers(text)):
        kind = _char_kind(char)
        if kind is _CharKind.IGNORED:
            continue
        if kind is _CharKind.BREAK:
            last = kind
        elif kind is _CharKind.MARK or (kind is last is _CharKind.WORD):
            if last is not _CharKind.BREAK:  # a mark without a base character is dropped
                tokens[-1].append(char)
        else:
            tokens.append([char])
            last = kind
    return ["".join(token) for token in tokens]


def _folded(text: str) -> str:
    return _normalized("NFKC", text).casefold()


def _normalized(form: Literal["NFC", "NFKC"], text: str) -> str:
    # The library sorts a run of marks in quadratic time, unless they are in order already.
    return unicodedata.normalize(form, text if len(text) <= _SHORT else _ordered(form, text))


def _ordered(form: Literal["NFC", "NFKC"], text: str) -> str:
    """The decomposition of `text`, with marks in canonical order: stably sorted by their class."""
    parts = (unicodedata.normalize(_DECOMPOSITIONS[form], char) for char in text)
    runs = groupby((char for part in parts for char in part), lambda char: unicodedata.combining(char) > 0)
    return "".join(
        "".join(sorted(run, key=unicodedata.combining) if are_marks else run) for are_marks, run in runs
    )


def _space_numbers(text: str) -> str:
    """`1½` is 1 1/2 and not 11/2, and `10²` is not 102: such a number begins or ends beside other digits."""
    parts: list[str] = []
    last = ""
    for char in text:
        category = unicodedata.category(char)
        if "No" in (last, category) and last.startswith("N") and category.startswith("N"):
            parts.append(" ")
        parts.append(char)
        last = category
    return "".join(parts)


def _without_symbols(text: str) -> str:
    """`text` with a space for each symbol that is not ASCII, also for those that mean letters or digits.

    Where no letter or digit of another script is left, nothing but ASCII is.
    """
    if text.isascii():
        return text
    kept = [char if _is_kept(char) else " " for char in _normalized("NFC", text)]
    if all(char.isascii() or _char_kind(char) in (_CharKind.IGNORED, _CharKind.MARK) for char in kept):
        kept = [char if char.isascii() else " " for char in kept]
    return "".join(kept)


@lru_cache(maxsize=8192)
def _is_kept(char: str) -> bool:
    if char.isascii() or _char_kind(char) in (_CharKind.IGNORED, _CharKind.MARK):
        return True
    category, meaning, point = unicodedata.category(char), unicodedata.decomposition(char), ord(char)
    if category in ("No", "Nl"):  # scripts' own numbers are kept, such as Ethiopic ones
        return not meaning and not _is_in(point, _SYMBOL_RANGES)
    is_letter_or_digit = category[0] == "L" or category == "Nd"
    return is_letter_or_digit and not meaning.startswith(("<super>", "<sub>"))


def _unicode_tokens(text: str) -> list[str]:
    return _words(text) or _whole(text)


def _whole(text: str) -> list[str]:
    """A value without letters and digits as one token; all blank values but the empty one are alike."""
    visible = "".join(char for char in _folded(text) if _char_kind(char) is not _CharKind.IGNORED)
    return [" ".join(visible.split()) or " "] if text else []


def _rouge_score_tokens(text: str) -> list[str]:
    return _ASCII_WORD.findall(text.lower())


def _whitespace_tokens(text: str) -> list[str]:
    return text.split() or _exact_tokens(text)


def _exact_tokens(text: str) -> list[str]:
    return [text] if text else []


_TOKENIZERS: dict[Tokenizer, Callable[[str], list[str]]] = {
    Tokenizer.UNICODE: _unicode_tokens,
    Tokenizer.ROUGE_SCORE: _rouge_score_tokens,
    Tokenizer.WHITESPACE: _whitespace_tokens,
    Tokenizer.EXACT: _exact_tokens,
}


def tokenize(text: str, tokenizer: Tokenizer = Tokenizer.UNICODE) -> list[str]:
    """Split `text` into the tokens that ROUGE-L compares.

    >>> tokenize("nav_bar.search_input")
    ['nav', 'bar', 'search', 'input']
    >>> tokenize("平安扣 Silver")
    ['平', '安', '扣', 'silver']
    """
    return _TOKENIZERS[tokenizer](text)


class Reference:
    """A true value, tokenised once for all values that are compared with it."""

    def __init__(self, truth: str, tokenizer: Tokenizer = Tokenizer.UNICODE) -> None:
        self._truth = truth
        self._tokenizer = tokenizer
        self._tokens = _Bits(tokenize(truth, tokenizer))
        self._plain: tuple[str, _Bits] | None = None

    def f1(self, predicted: str) -> float:
        """ROUGE-L F1 of a value and the true one, in [0, 1]; 0 when either has no token."""
        if predicted == self._truth:
            return 1.0 if self._tokens.num_tokens else 0.0
        similarity = self._tokens.f1(tokenize(predicted, self._tokenizer))
        if self._tokenizer is not Tokenizer.UNICODE or similarity == 1:
            return similarity
        if predicted.isascii() and self._truth.isascii():  # neither has a symbol
            return similarity
        if self._plain is None:
            text = _without_symbols(self._truth)
            self._plain = text, _Bits(_words(text))
        plain = _without_symbols(predicted)
        if (plain, self._plain[0]) == (predicted, self._truth):
            return similarity
        return max(similarity, self._plain[1].f1(_words(plain)))


class _Bits:
    """Tokens as an integer for each of them, with a bit for each of its places (Hyyrö 2004)."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.num_tokens = len(tokens)
        self._places: dict[str, int] = {}
        for i, token in enumerate(tokens):
            self._places[token] = self._places.get(token, 0) | 1 << i

    def f1(self, predicted: Sequence[str]) -> float:
        if not predicted or not self.num_tokens:
            return 0.0
        return 2 * self._lcs_length(predicted) / (len(predicted) + self.num_tokens)

    def _lcs_length(self, predicted: Sequence[str]) -> int:
        """The length of the longest common subsequence, in O(predicted · true / word size)."""
        row = all_ones = (1 << self.num_tokens) - 1  # a bit is 0 where the LCS of the prefixes grows
        for token in predicted:
            matches = row & self._places.get(token, 0)
            if matches:
                row = (row + matches | row - matches) & all_ones
        return self.num_tokens - row.bit_count()


def rouge_l_f1(predicted: str, truth: str, tokenizer: Tokenizer = Tokenizer.UNICODE) -> float:
    """ROUGE-L F1 of two strings, in [0, 1]; 0 when either has no token.

    Every value but the empty string has a token, except with `Tokenizer.ROUGE_SCORE`.

    >>> rouge_l_f1("nav_bar.search_button", "nav_bar.search_input")
    0.75
    >>> rouge_l_f1("平安扣", "平安扣")
    1.0
    >>> rouge_l_f1("Nike™ Air", "nike air")
    1.0
    """
    return Reference(truth, tokenizer).f1(predicted)
