"""From text to token ids and back, always knowing which characters belong to which token.

A token belongs to a span of characters when it overlaps it. A byte-level token that carries part of a
character overlaps that character.

Text is tokenised on its own, without special tokens. Ids are never re-tokenised: their characters are
found by decoding. Both ways give a completion that decodes to itself the same offsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from shopr1_client.wire import Message
from shopr1_rewards import Span

_REPLACEMENT = "\ufffd"  # what bytes that are no whole character decode to
_MAX_WINDOW = 8
"""Tokens until which bytes must have become whole characters: UTF-8 needs 4 bytes at most."""


class CodecError(ValueError):
    """Input that the policy's tokenizer cannot take."""


@dataclass(frozen=True)
class Tokens:
    """A text and its tokens; `offsets[i]` are the characters that token i overlaps."""

    text: str
    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]

    def overlapping(self, span: Span) -> list[int]:
        """Indices of the tokens that overlap the span, ascending."""
        return [i for i, (start, end) in enumerate(self.offsets) if start < span.end and end > span.start]


class Codec(Protocol):
    """The policy's tokenizer as the service uses it."""

    @property
    def num_ids(self) -> int:
        """Token ids are in 0 … num_ids − 1."""
        ...

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """Texts of end-of-turn and padding tokens, which do not count behind an answer."""
        ...

    def encode_text(self, text: str) -> Tokens:
        """Tokenise text on its own, without special tokens."""
        ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat in the policy's template, with the generation prompt.

        Raises:
            CodecError: there is no template, or it refuses the messages.
        """
        ...

    def decode(self, ids: Sequence[int]) -> Tokens:
        """Text and offsets of ids, special tokens written out."""
        ...


class PolicyCodec:
    """A `Codec` on a fast tokenizer of transformers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_ids: int, end_ids: Sequence[int]) -> None:
        if not tokenizer.is_fast:
            raise CodecError(f"{type(tokenizer).__name__} has no offsets; a tokenizer.json is needed")
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json may cut or pad silently.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.num_ids = num_ids
        self.end_tokens = tuple(dict.fromkeys(self._decode([token_id]) for token_id in end_ids))

    def encode_text(self, text: str) -> Tokens:
        encoding = self._backend.encode(text, add_special_tokens=False)
        decoded = self.decode(encoding.ids)
        if decoded.text == text:
            return decoded
        # The tokenizer normalises: only its own bookkeeping knows the characters.
        return Tokens(text, encoding.ids, encoding.offsets)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        chat = [message.model_dump() for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs: they raise what they like
            raise CodecError(f"the policy's chat template refuses the messages: {error}") from error
        return list(self._backend.encode(str(text), add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> Tokens:
        ids = list(ids)
        text = self._decode(ids)
        tokens = self._windowed_offsets(ids)
        return tokens if tokens and tokens.text == text else self._prefix_offsets(ids, text)

    def _decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def _windowed_offsets(self, ids: list[int]) -> Tokens | None:
        """Offsets in time linear in the tokens: decode only until the bytes at hand are whole characters.

        A window starts with the tokens of the one before, because some decoders treat the first token apart.
        The texts of the windows are joined; the caller compares them with the text decoded at once.
        """
        text, offsets = "", list[tuple[int, int]]()
        context = 0  # first id of the window; ids[context:done] have been placed already
        done = 0
        for end in range(1, len(ids) + 1):
            before = self._decode(ids[context:done])
            window = self._decode(ids[context:end])
            if window.endswith(_REPLACEMENT) and end < len(ids) and end - done < _MAX_WINDOW:
                continue
            if not window.startswith(before):
                return None
            prefixes = [self._decode(ids[context:k]) for k in range(done + 1, end)]
            placed = _place(window, len(before), [*prefixes, window])
            offsets += [(len(text) + a - len(before), len(text) + b - len(before)) for a, b in placed]
            text += window[len(before) :]
            context, done = done, end
        return Tokens(text, ids, offsets)

    def _prefix_offsets(self, ids: list[int], text: str) -> Tokens:
        """Offsets from decoding every prefix: right for any decoder, quadratic in the tokens."""
        prefixes = [self._decode(ids[:end]) for end in range(1, len(ids) + 1)]
        return Tokens(text, ids, _place(text, 0, prefixes))


def _place(text: str, start: int, prefixes: Sequence[str]) -> list[tuple[int, int]]:
    """The characters of `text` that each token behind `start` overlaps, given what its prefixes decode to.

    Bytes that are no whole character yet decode to replacement characters at the prefix's end. Their tokens
    wait until it is known what they have become: a character, or replacement characters for good.
    """
    offsets: list[tuple[int, int]] = []
    waiting: list[int] = []  # how far the prefix of each token that waits reaches beyond `start`
    for prefix in prefixes:
        whole = max(start, _common_length(prefix.rstrip(_REPLACEMENT), text))
        first = start
        if waiting and whole > start:
            _settle(offsets, waiting, text, start)
            # The token that completes a character belongs to it; one behind replacement characters does not.
            first = _end_of_character(text, start) if text[start] == _REPLACEMENT else start
            waiting = []
        offsets.append((first, max(first, whole)))
        start = whole
        if len(prefix) > whole:
            waiting.append(max(len(prefix) - whole, *waiting, 0))
    _settle(offsets, waiting, text, start)
    return offsets


def _settle(offsets: list[tuple[int, int]], waiting: Sequence[int], text: str, start: int) -> None:
    """Give the last tokens, which have waited, the character at `start` or their replacement characters."""
    num_characters = _end_of_character(text, start) - start
    before = 0
    for i, reach in enumerate(waiting, len(offsets) - len(waiting)):
        last = min(reach, num_characters)
        first = max(0, min(before, last - 1)) if text.startswith(_REPLACEMENT, start) else 0
        own_start, own_end = offsets[i]
        offsets[i] = (own_start if own_start < start else start + first, max(own_end, start + last))
        before = reach


def _end_of_character(text: str, start: int) -> int:
    """Behind the character at `start`; behind all of them where it is a run of replacement characters."""
    end = min(start + 1, len(text))
    while text.startswith(_REPLACEMENT, start) and text.startswith(_REPLACEMENT, end):
        end += 1
    return end


def _common_length(left: str, right: str) -> int:
    low, high = 0, min(len(left), len(right))
    while low < high:  # the longest equal beginning, by bisection: slices compare fast
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
