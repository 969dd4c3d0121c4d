r"""Similarity of two attribute values: ROUGE-L F1 (Lin 2004) over a declared tokenisation.

    ROUGE-L F1(x, y) = 2 · LCS(x, y) / (|x| + |y|)        in [0, 1]; 0 if either has no token

LCS is the length of the longest common subsequence of tokens, |·| the number of tokens. This is the
harmonic mean of LCS/|x| and LCS/|y|, rounded once. Shop-R1 names ROUGE-L but not its tokens, and the
tokens decide: `button_list.white` against `button_list.black` is 0 when a name is one token.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import lru_cache

from rapidfuzz.distance import LCSseq

_ASCII_WORD = re.compile(r"[a-z0-9]+")

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


class Tokenizer(StrEnum):
    """Tokenisation of attribute values for ROUGE-L."""

    UNICODE = "unicode"
    """Case-folded words of any script; Han, Kana, Thai … by character. Equal to `rouge_score` on ASCII."""
    ROUGE_SCORE = "rouge_score"
    """Google's `rouge_score` without stemming: runs of a-z and 0-9. Drops every other script."""
    WHITESPACE = "whitespace"
    """Split at white space, with case and punctuation."""
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
    category = unicodedata.category(char)
    if category.startswith("M"):
        return _CharKind.MARK
    if category == "Cf":  # zero-width spaces and joiners, soft hyphens: copied, never intended
        return _CharKind.IGNORED
    if category[0] not in "LN":
        return _CharKind.BREAK
    point = ord(char)
    unspaced = any(first <= point <= last for first, last in _UNSPACED_RANGES)
    return _CharKind.SINGLE if unspaced else _CharKind.WORD


def _unicode_tokens(text: str) -> list[str]:
    if text.isascii():
        return _rouge_score_tokens(text)
    tokens: list[str] = []
    last = _CharKind.BREAK
    for char in unicodedata.normalize("NFKC", text).casefold():
        kind = _char_kind(char)
        if kind is _CharKind.IGNORED:
            continue
        if kind is _CharKind.BREAK:
            last = kind
        elif kind is _CharKind.MARK or (kind is last is _CharKind.WORD):
            if last is not _CharKind.BREAK:  # a mark without a base character is dropped
                tokens[-1] += char
        else:
            tokens.append(char)
            last = kind
    return tokens


def _rouge_score_tokens(text: str) -> list[str]:
    return _ASCII_WORD.findall(text.lower())


def _whitespace_tokens(text: str) -> list[str]:
    return text.split()


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


def _lcs_length(left: Sequence[str], right: Sequence[str]) -> int:
    # rapidfuzz compares hashes; numbers of tokens make the comparison exact.
    numbers: dict[str, int] = {}
    left_ids = [numbers.setdefault(token, len(numbers)) for token in left]
    right_ids = [numbers.setdefault(token, len(numbers)) for token in right]
    return int(LCSseq.similarity(left_ids, right_ids))


def rouge_l_f1(predicted: str, truth: str, tokenizer: Tokenizer = Tokenizer.UNICODE) -> float:
    """ROUGE-L F1 of two strings, in [0, 1]; 0 when either has no token.

    >>> rouge_l_f1("nav_bar.search_button", "nav_bar.search_input")
    0.75
    >>> rouge_l_f1("平安扣", "平安扣")
    1.0
    """
    predicted_tokens, truth_tokens = tokenize(predicted, tokenizer), tokenize(truth, tokenizer)
    if not predicted_tokens or not truth_tokens:
        return 0.0
    num_tokens = len(predicted_tokens) + len(truth_tokens)
    return 2 * _lcs_length(predicted_tokens, truth_tokens) / num_tokens
