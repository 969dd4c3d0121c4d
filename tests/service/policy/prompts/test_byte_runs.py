"""Characters of runs of bytes: by hand. `test_tokenizer.py` compares them with every decoder."""

import pytest

from shopr1_service.policy.prompts.byte_runs import REPLACEMENT, ByteVocabulary, run_offsets
from tests.support.models import byte_fallback, byte_level

TEA = "茶".encode()


@pytest.mark.parametrize(
    ("pieces", "text", "offsets"),
    [
        ([b"\xe8", b"\x8c", b"\xb6"], "茶", [(0, 1)] * 3),
        ([b"\xe8", b"\x8c\xb6x", b"y"], "茶xy", [(0, 1), (0, 2), (2, 3)]),
        ([b"\xe8\x8c", b"\xe8"], "\ufffd\ufffd", [(0, 1), (1, 2)]),  # one for each broken character
        ([b"\xe8", b"\x8c", b"\xe8"], "\ufffd\ufffd", [(0, 1), (0, 1), (1, 2)]),
        ([b"\xe8", b"\x8c", b"\xe8"], "\ufffd\ufffd\ufffd", [(0, 1), (1, 2), (2, 3)]),  # for each byte
        ([TEA, b"\xff"], "\ufffd" * 4, [(0, 3), (3, 4)]),
        ([TEA, b"\xff"], "茶\ufffd", [(0, 1), (1, 2)]),
        ([REPLACEMENT.encode(), b"\xf0\x9f"], "\ufffd\ufffd", [(0, 1), (1, 2)]),  # written out, and broken
        ([b"a", b"", b"\xe8"], "a\ufffd", [(0, 1), (1, 1), (1, 2)]),
        ([b"", b"a"], "a", [(0, 0), (0, 1)]),
        ([b" ", b" ", b"\xe8"], " \ufffd", [(0, 0), (0, 1), (1, 2)]),  # the first space is left out
        ([], "", []),
    ],
)
def test_offsets(pieces: list[bytes], text: str, offsets: list[tuple[int, int]]) -> None:
    assert run_offsets(pieces, text) == offsets


@pytest.mark.parametrize(("pieces", "text"), [([b"\xe8"], "a"), ([b"ab"], "b"), ([b"a"], "ab"), ([], "a")])
def test_another_text_has_none(pieces: list[bytes], text: str) -> None:
    assert run_offsets(pieces, text) is None


def test_bytes_of_a_byte_level_vocabulary() -> None:
    backend = byte_level().backend_tokenizer
    vocabulary = ByteVocabulary(backend)
    ids = backend.encode("茶 x", add_special_tokens=False).ids
    assert b"".join(map(vocabulary.bytes_of, ids)) == "茶 x".encode()
    assert not any(map(vocabulary.is_byte, ids))
    assert vocabulary.bytes_of(10**6) == b""


def test_bytes_of_a_vocabulary_with_fallback() -> None:
    backend = byte_fallback().backend_tokenizer
    vocabulary = ByteVocabulary(backend)
    letter, byte = (backend.get_vocab()[piece] for piece in ("t", "<0x74>"))
    assert [vocabulary.bytes_of(token_id) for token_id in (letter, byte)] == [b"t", b"t"]
    assert [vocabulary.is_byte(token_id) for token_id in (letter, byte)] == [False, True]
