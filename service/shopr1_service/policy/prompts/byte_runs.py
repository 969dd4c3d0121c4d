"""Characters of consecutive tokens that carry only parts of characters, from the tokens' bytes.

Decoders write U+FFFD for bytes that are no character, in two ways:

    ByteLevel      one for each maximal part of a character, as Python's `errors="replace"`
    ByteFallback   one for each byte of the run, if any of its bytes is broken

Both are linear in the bytes; decoding every prefix of a run would be quadratic.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate

from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

REPLACEMENT = "\ufffd"
"""The text of bytes that are no whole character."""

_BYTES = {char: byte for byte, char in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


class ByteVocabulary:
    """The bytes of a tokenizer's tokens, by how its decoder reads them."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        decoder = b"" if backend.decoder is None else bytes(backend.decoder.__getstate__())
        self._has_fallback = b"ByteFallback" in decoder
        self._is_byte_level = b"ByteLevel" in decoder

    def is_byte(self, token_id: int) -> bool:
        """Whether a token joins the run of bytes around it, even if it is a character of its own."""
        return self._has_fallback and _BYTE_PIECE.fullmatch(self._piece(token_id)) is not None

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token adds to a run."""
        piece = self._piece(token_id)
        if self._has_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(match[1])
        if self._is_byte_level and all(char in _BYTES for char in piece):
            return bytes(_BYTES[char] for char in piece)
        return piece.encode()

    def _piece(self, token_id: int) -> str:
        return self._backend.id_to_token(token_id) or ""


def run_offsets(pieces: Sequence[bytes], text: str) -> list[tuple[int, int]] | None:
    """The characters of `text` that each token overlaps; None if the text is not that of these bytes.

    Args:
        pieces: the bytes of each token of a run.
        text: what the run decodes to.
    """
    data = b"".join(pieces)
    for decoded in (data.decode(errors="replace"), REPLACEMENT * len(data)):
        num_stripped = len(decoded) - len(text)
        if decoded.endswith(text) and not decoded[:num_stripped].strip(" "):
            widths = _widths(data, decoded) if len(decoded) < len(data) else [1] * len(data)
            break
    else:
        return None
    # Of each byte, its character. The space at the beginning of a text, which is left out, is number -1.
    owners = [i - num_stripped for i, width in enumerate(widths) for _ in range(width)]
    ends = list(accumulate(map(len, pieces)))
    spans = (_span(owners, end - len(piece), end) for piece, end in zip(pieces, ends, strict=True))
    return [(max(first, 0), max(last, 0)) for first, last in spans]


def _span(owners: Sequence[int], start: int, end: int) -> tuple[int, int]:
    if start == end:  # a token without bytes is at the end of the one before it
        position = owners[start - 1] + 1 if start else 0
        return position, position
    return owners[start], owners[end - 1] + 1


def _widths(data: bytes, text: str) -> Iterator[int]:
    """The number of bytes of each character; of a U+FFFD, those of the broken part that it replaces."""
    position = 0
    for char in text:
        width = _num_broken(data[position : position + 4]) if char == REPLACEMENT else len(char.encode())
        yield width
        position += width


def _num_broken(data: bytes) -> int:
    """The number of bytes at the beginning that make one U+FFFD."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if error.start == 0:
            return error.end
    return len(REPLACEMENT.encode())  # it is written out
