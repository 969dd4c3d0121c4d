"""From text to token ids and back, always knowing which characters belong to which token.

A token belongs to a span of characters when it overlaps it. A byte-level token that carries part of a
character overlaps that character.

Text is tokenised on its own, without special tokens. Ids are never re-tokenised: their characters are
found by decoding. Both ways give a completion that decodes to itself the same offsets.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from shopr1_client.wire import Message
from shopr1_service.core import CodecError, Tokens

_REPLACEMENT = "\ufffd"  # what bytes that are no whole character decode to
_MAX_WINDOW = 8
"""Tokens until which bytes must have become whole characters: UTF-8 needs 4 bytes at most."""


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

    def encode_ids(self, text: str) -> Sequence[int]:
        """The ids of `encode_text`: where no offsets are needed."""
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


class PolicyTokenizer:
    """A `Codec` on a fast tokenizer of transformers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_ids: int, end_ids: Sequence[int]) -> None:
        if not tokenizer.is_fast:
            raise CodecError(f"{type(tokenizer).__name__} has no offsets; a tokenizer.json is needed")
        self.tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json may cut or pad silently.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._before = self._backend.encode("a", add_special_tokens=False).ids
        self._text_before = self._decode(self._before)
        self._pieces_inside: dict[int, str | None] = {}
        """By their ids, as far as they have been asked for."""
        self.num_ids = num_ids
        self.end_tokens = tuple(dict.fromkeys(self._decode([token_id]) for token_id in end_ids))

    def encode_text(self, text: str) -> Tokens:
        decoded = self.decode(self.encode_ids(text))
        if decoded.text == text:
            return decoded
        # The tokenizer normalises: only its own bookkeeping knows the characters.
        encoding = self._backend.encode(text, add_special_tokens=False)
        return Tokens(text, encoding.ids, encoding.offsets)

    def encode_ids(self, text: str) -> Sequence[int]:
        # Of the library's ways this one counts no characters, and lets other threads go on meanwhile.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=False)
        ids: Sequence[int] = encoding.ids
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        chat = [message.model_dump() for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs: they raise what they like
            raise CodecError(f"the policy's chat template refuses the messages: {error}") from error
        return list(self.encode_ids(str(text)))

    def decode(self, ids: Sequence[int]) -> Tokens:
        ids = list(ids)
        text = self._decode(ids)
        for only_windows in (False, True):
            tokens = self._windowed_offsets(ids, only_windows=only_windows)
            if tokens is not None and tokens.text == text:
                return tokens
        return self._prefix_offsets(ids, text)

    def _decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def _windowed_offsets(self, ids: list[int], *, only_windows: bool) -> Tokens | None:
        """Offsets in time linear in the tokens: decode only until the bytes at hand are whole characters.

        A window starts with the tokens of the one before, because some decoders treat the first token apart.
        A token of whole characters needs none, unless what it decodes to depends on the one before. All texts
        are joined; the caller compares them with the text decoded at once.
        """
        text, offsets = "", list[tuple[int, int]]()
        context = 0  # first id of the window; ids[context:done] have been placed already
        done = 0
        for end in range(1, len(ids) + 1):
            piece = self._piece_inside(ids[done]) if 0 < done == end - 1 and not only_windows else None
            if piece is not None:
                offsets.append((len(text), len(text) + len(piece)))
                text += piece
                context, done = done, end
                continue
            before = self._decode(ids[context:done])
            window = self._decode(ids[context:end])
            if window.endswith(_REPLACEMENT) and end < len(ids) and end - done < _MAX_WINDOW:
                continue
            if not window.startswith(before):
                return None
            prefixes = [self._decode(ids[context:k]) for k in range(done + 1, end)]
            placed = _place(window, before, [*prefixes, window], self._pieces(ids[done:end]))
            offsets += [(len(text) + a - len(before), len(text) + b - len(before)) for a, b in placed]
            text += window[len(before) :]
            context, done = done, end
        return Tokens(text, ids, offsets)

    def _prefix_offsets(self, ids: list[int], text: str) -> Tokens:
        """Offsets from decoding every prefix: right for any decoder, quadratic in the tokens."""
        prefixes = [self._decode(ids[:end]) for end in range(1, len(ids) + 1)]
        return Tokens(text, ids, _place(text, "", prefixes, self._pieces(ids)))

    def _piece_inside(self, token_id: int) -> str | None:
        """What a token decodes to behind another one; None if that has not only whole characters."""
        if token_id not in self._pieces_inside:
            text = self._decode([*self._before, token_id])
            piece = text[len(self._text_before) :]
            is_behind = bool(self._text_before) and text.startswith(self._text_before)
            self._pieces_inside[token_id] = piece if is_behind and _REPLACEMENT not in piece else None
        return self._pieces_inside[token_id]

    def _pieces(self, ids: list[int]) -> list[str]:
        return [self._decode([token_id]) for token_id in ids]


def _place(text: str, before: str, prefixes: Sequence[str], pieces: Sequence[str]) -> list[tuple[int, int]]:
    """The characters of `text` that each further token overlaps.

    Args:
        before: what the tokens before them decode to.
        prefixes: what all tokens up to and with each of them decode to; the last one is `text`.
        pieces: what each of them decodes to alone.

    Bytes that are no whole character yet decode to replacement characters, which vanish when the character is
    whole. What a token adds for good is how far the shortest prefix from it on reaches.
    """
    reaches = list(accumulate((len(prefix) for prefix in reversed(prefixes)), min))[::-1]
    offsets: list[tuple[int, int]] = []
    start, former = len(before), before
    for prefix, piece, end in zip(prefixes, pieces, reaches, strict=True):
        first = start - 1 if _is_joined(text, start, end, former, prefix, piece) else start
        first = max(first, offsets[-1][0]) if offsets else first
        offsets.append((first, max(first, end)))
        start, former = max(start, end), prefix
    return offsets


def _is_joined(text: str, start: int, end: int, former: str, prefix: str, piece: str) -> bool:
    """Whether a token has bytes of the character before `start`, which another token has begun."""
    if not start or _REPLACEMENT not in (former[-1:], prefix[-1:]):
        return False
    completes_it = former[start - 1 : start] != text[start - 1]
    adds_less_than_itself = former.endswith(_REPLACEMENT) and len(prefix) < len(former) + len(piece)
    return end <= start or completes_it or adds_less_than_itself
