from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from shopr1_client.wire import Message
from shopr1_client.wire_prompt import PromptOptions, ScoreWarning
from shopr1_rewards import Span
from shopr1_service.core import CodecError, Tokens
from shopr1_service.policy.prompts.tokenizer import PolicyTokenizer
from tests.support.models import (
    NUM_ROWS,
    NUM_TOKENS,
    byte_fallback,
    byte_level,
    byte_level_json,
    ids_of,
    normalising,
    slow_overlapping,
    token_bytes,
    unigram,
    word_ends,
    word_piece,
    wrapped,
)

REPLACEMENT = "\ufffd"

TOKENIZERS = {"byte_level": byte_level(), "byte_fallback": byte_fallback(), "unigram": unigram()}
CODECS = {name: PolicyTokenizer(tokenizer, NUM_ROWS, []) for name, tokenizer in TOKENIZERS.items()}
EVERY_KIND = pytest.mark.parametrize("name", CODECS)

# U+FFFD has its own tests below: part of a character decodes to it too.
characters = st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT)
texts = st.text(characters | st.sampled_from('茶便🍵é–\u0301 \n"\\'), max_size=30)
any_ids = st.lists(st.integers(0, NUM_ROWS - 1), max_size=30)  # 18 of these ids have no token
broken_bytes = st.lists(texts.map(str.encode) | st.binary(max_size=3), max_size=5).map(b"".join)


_SPELLINGS = {
    name: {token_bytes(tokenizer, [3, i])[1]: i for i in range(3, len(tokenizer))}
    for name, tokenizer in TOKENIZERS.items()
}


def spelling(name: str, *pieces: bytes) -> list[int]:
    """The ids of these tokens, by their bytes. Not for the beginning of a text, which may lose a space."""
    return [_SPELLINGS[name][piece] for piece in pieces]


def owners(tokens: Tokens) -> list[list[int]]:
    """The tokens of each character."""
    return [tokens.overlapping(Span(i, i + 1)) for i in range(len(tokens.text))]


# --- text -------------------------------------------------------------------------------------------


@given(texts)
@example("便宜的茶 🍵🛒")
@example("a<|im_end|>b<|endoftext|>")
@example("  \n\n")
def test_byte_level_offsets_equal_the_librarys(text: str) -> None:
    encoding = TOKENIZERS["byte_level"].backend_tokenizer.encode(text, add_special_tokens=False)
    assert CODECS["byte_level"].encode_text(text) == Tokens(text, encoding.ids, encoding.offsets)


@EVERY_KIND
@given(text=texts)
@example(text="  茶 茶茶 ")
def test_a_character_belongs_to_the_tokens_that_have_its_bytes(name: str, text: str) -> None:
    text = f"x{text}"  # byte_fallback drops a space at the beginning
    tokens = CODECS[name].encode_text(text)
    assert tokens.text == text
    spelt = token_bytes(TOKENIZERS[name], tokens.ids)
    assert owners(tokens) == [slow_overlapping(spelt, text, Span(i, i + 1)) for i in range(len(text))]


@EVERY_KIND
@given(text=texts)
def test_ids_and_their_text_give_the_same_tokens(name: str, text: str) -> None:
    tokens = CODECS[name].encode_text(f"x{text}")
    assert CODECS[name].decode(tokens.ids) == tokens


@EVERY_KIND
@given(text=texts)
def test_ids_alone_are_those_of_the_text(name: str, text: str) -> None:
    assert CODECS[name].encode_ids(text) == CODECS[name].encode_text(text).ids


def test_space_at_the_beginning() -> None:
    # The ids decode to `a b`. If the text is known, its space is kept.
    tokens = CODECS["byte_fallback"].encode_text(" a b")
    assert tokens.text == " a b"
    assert owners(tokens) == [[0], [1], [2], [3]]
    assert CODECS["byte_fallback"].decode(tokens.ids).text == "a b"


@pytest.mark.parametrize(
    ("span", "indices"),
    [
        ((0, 1), [0]),
        ((0, 3), [0, 1, 2]),
        ((1, 2), [1, 2]),
        ((2, 3), [2]),
        ((0, 4), [0, 1, 2, 3, 4]),
        ((2, 4), [2, 3, 4]),
        ((3, 4), [4]),  # a token without characters counts inside a span, not at its edge
        ((1, 1), []),
    ],
)
def test_overlapping(span: tuple[int, int], indices: list[int]) -> None:
    # a | first half of é | its second half and b | nothing | c
    tokens = Tokens("aébc", [1, 2, 3, 4, 5], [(0, 1), (1, 2), (1, 3), (3, 3), (3, 4)])
    assert tokens.overlapping(Span(*span)) == indices


def test_special_tokens_are_neither_added_nor_dropped() -> None:
    codec = CODECS["byte_level"]
    [im_end] = ids_of(TOKENIZERS["byte_level"], "<|im_end|>")
    tokens = codec.encode_text("茶<|im_end|>")
    assert tokens.ids[-1] == im_end
    assert tokens.offsets[-1] == (1, 11)
    assert codec.decode([im_end, im_end]).text == "<|im_end|><|im_end|>"
    assert codec.encode_text("") == Tokens("", [], [])


def test_normalised_text_keeps_its_characters() -> None:
    # ﬁ becomes f and i; Ａ (full width) and A become a.
    tokenizer = normalising()
    text = "ﬁx ＡA茶"
    tokens = PolicyTokenizer(tokenizer, NUM_ROWS, []).encode_text(text)
    spelt = token_bytes(tokenizer, tokens.ids)
    assert tokens.text == text
    assert b"".join(spelt).decode() == "fix aa茶"
    of_characters = [b"".join(spelt[i] for i in indices).decode() for indices in owners(tokens)]
    assert of_characters == ["fi", "x", " ", "a", "a", "茶"]


@given(texts)
def test_normalised_text_is_covered(text: str) -> None:
    tokens = PolicyTokenizer(normalising(), NUM_ROWS, []).encode_text(text)
    assert tokens.text == text
    assert all(0 <= start <= end <= len(text) for start, end in tokens.offsets)


# --- ids --------------------------------------------------------------------------------------------


def check_decoded(name: str, ids: list[int]) -> None:
    codec = CODECS[name]
    tokens = codec.decode(ids)
    assert tokens.text == TOKENIZERS[name].backend_tokenizer.decode(ids, skip_special_tokens=False)
    assert tokens.ids == ids
    assert len(tokens.offsets) == len(ids)
    starts, ends = [start for start, _ in tokens.offsets], [end for _, end in tokens.offsets]
    assert all(0 <= start <= end <= len(tokens.text) for start, end in tokens.offsets)
    assert (starts, ends) == (sorted(starts), sorted(ends))
    assert all(owners(tokens)), "a character without a token"
    if REPLACEMENT not in tokens.text:
        assert tokens == codec._offsets_by_prefixes(ids, tokens.text)


@EVERY_KIND
@settings(max_examples=500)
@given(ids=any_ids)
def test_any_ids_can_be_decoded(name: str, ids: list[int]) -> None:
    check_decoded(name, ids)


@EVERY_KIND
@settings(max_examples=500)
@given(text=broken_bytes)
@example(text="茶🍵é".encode())
@example(text="茶🍵é".encode()[1:-1])
@example(text=b"\xe8" * 12 + "茶".encode())  # longer than any window
def test_any_bytes_can_be_decoded(name: str, text: bytes) -> None:
    check_decoded(name, spelling(name, *(bytes([byte]) for byte in text)))


def characters_of(data: bytes) -> list[tuple[int, int]]:
    """The byte range of each character of the decoded data; each broken run is one U+FFFD."""
    ranges: list[tuple[int, int]] = []
    position = 0
    while position < len(data):
        try:
            valid, num_broken = data[position:].decode(), 0
        except UnicodeDecodeError as error:
            valid, num_broken = data[position : position + error.start].decode(), error.end - error.start
        for num_bytes in [*(len(char.encode()) for char in valid), *[num_broken] * (num_broken > 0)]:
            ranges.append((position, position + num_bytes))
            position += num_bytes
    return ranges


@settings(max_examples=500)
@given(st.lists(st.integers(0, NUM_TOKENS - 1), max_size=10))
@example(spelling("byte_level", b"t", b"\x80", b"\xc2", b"\x80", b"t"))
@example(spelling("byte_level", b"t", b"\xe8", b"\x8c", b"\xe8", b"\x8c", b"t"))
def test_a_broken_character_belongs_to_the_tokens_that_have_its_bytes(ids: list[int]) -> None:
    spelt = token_bytes(TOKENIZERS["byte_level"], ids)
    tokens = CODECS["byte_level"].decode(ids)
    starts = [len(b"".join(spelt[:i])) for i in range(len(spelt))]
    assert owners(tokens) == [
        [i for i, piece in enumerate(spelt) if starts[i] < end and start < starts[i] + len(piece)]
        for start, end in characters_of(b"".join(spelt))
    ]


@given(texts)
def test_windows_are_enough_for_text(text: str) -> None:
    codec, ids = CODECS["byte_level"], ids_of(TOKENIZERS["byte_level"], text)
    expected = codec._offsets_by_prefixes(ids, text)
    assert codec._offsets_by_windows(ids) == expected
    assert codec._offsets_by_windows(ids, only_windows=True) == expected


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@settings(max_examples=300)
@given(text=texts)
@example(text="茶" * 20)
def test_bytes_give_the_same_offsets_as_prefixes(name: str, text: str) -> None:
    ids = spelling(name, b"t", *(bytes([byte]) for byte in text.encode()), b"t")
    assert CODECS[name]._offsets_by_runs(ids) == CODECS[name]._offsets_by_prefixes(ids, f"t{text}t")


@EVERY_KIND
@settings(max_examples=300)
@given(ids=any_ids.map(lambda ids: ids * 3))
def test_bytes_give_the_whole_text_of_any_ids(name: str, ids: list[int]) -> None:
    found = CODECS[name]._offsets_by_runs(ids)
    assert found is not None
    assert found.text == TOKENIZERS[name].backend_tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("name", "pieces", "text", "tokens_of_character"),
    [
        pytest.param("byte_level", [b"\xe8", b"\x8c", b"\xb6"], "t茶t", [1, 2, 3], id="whole"),
        pytest.param("byte_level", [b"\xe8", b"\x8c"], "t\ufffdt", [1, 2], id="broken"),
        pytest.param("byte_level", [b"\xef", b"\xbf", b"\xbd"], "t\ufffdt", [1, 2, 3], id="literal"),
        # This decoder writes one U+FFFD for each broken byte.
        pytest.param("byte_fallback", [b"\xe8", b"\x8c", b"\xb6"], "t茶t", [1, 2, 3], id="fallback-whole"),
        pytest.param("byte_fallback", [b"\xe8", b"\x8c"], "t\ufffd\ufffdt", [1], id="fallback-broken"),
        pytest.param(
            "byte_fallback", [b"\xef", b"\xbf", b"\xbd"], "t\ufffdt", [1, 2, 3], id="fallback-literal"
        ),
    ],
)
def test_every_token_of_a_replacement_character_belongs_to_it(
    name: str, pieces: list[bytes], text: str, tokens_of_character: list[int]
) -> None:
    tokens = CODECS[name].decode(spelling(name, b"t", *pieces, b"t"))
    assert tokens.text == text
    first, second, *_, last = owners(tokens)
    assert (first, second, last) == ([0], tokens_of_character, [len(pieces) + 1])


@pytest.mark.parametrize("token_id", [371, 388, 10**6])
def test_ids_without_a_token_have_no_text(token_id: int) -> None:
    tokens = CODECS["byte_level"].decode(
        [*spelling("byte_level", b"a"), token_id, *spelling("byte_level", b"b")]
    )
    assert (tokens.text, tokens.offsets) == ("ab", [(0, 1), (1, 1), (1, 2)])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("byte_level", "cheaper tea, "),
        ("byte_level", "便宜的茶🍵"),
        ("byte_fallback", "cheaper tea, "),
        ("byte_fallback", "便宜的茶🍵"),
        ("word_ends", "cheaper tea, "),
    ],
)
def test_decoding_is_linear_in_the_tokens(name: str, text: str) -> None:
    # Counts decoded ids, not seconds. A completion may have 30,000 tokens.
    class CountingCodec(PolicyTokenizer):
        num_decoded = 0

        def _decode(self, ids: list[int]) -> str:
            CountingCodec.num_decoded += len(ids)
            return super()._decode(ids)

    tokenizer = word_ends() if name == "word_ends" else TOKENIZERS[name]
    ids = ids_of(tokenizer, text * 100)
    CountingCodec(tokenizer, NUM_ROWS, []).decode(ids)
    assert CountingCodec.num_decoded < 50 * len(ids)


PARTIAL = {
    "first bytes": [b"\xe8"],
    "later bytes": [b"\x8c"],
    "two of three": [b"\xe8", b"\x8c"],
    "three of four": [b"\xf0", b"\x9f", b"\x98"],
    "surrogates": [b"\xed", b"\xa0", b"\x80"],
    "broken and whole": [b"\xf0", b"\x9f", b"\xe8", b"\x8c", b"\xb6", b"\xff"],
    "whole, and broken at the end of each": [*(bytes([byte]) for byte in "茶".encode() * 9), b"\xc3"],
}


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("pieces", PARTIAL.values(), ids=list(PARTIAL))
def test_decoding_parts_of_characters_is_linear_in_the_tokens(name: str, pieces: list[bytes]) -> None:
    # Counted like above. With every prefix decoded, twice as many tokens were four times the work.
    class CountingCodec(PolicyTokenizer):
        num_decoded = 0

        def _decode(self, ids: list[int]) -> str:
            self.num_decoded += len(ids)
            return super()._decode(ids)

    def work(num_tokens: int) -> int:
        codec = CountingCodec(TOKENIZERS[name], NUM_ROWS, [])
        run = [*spelling(name, b"t"), *spelling(name, *pieces) * (num_tokens // len(pieces))]
        before = codec.num_decoded
        tokens = codec.decode(run)
        covered = {i for start, end in tokens.offsets for i in range(start, end)}
        assert covered == set(range(len(tokens.text)))
        return codec.num_decoded - before

    short, long = work(3000), work(6000)
    assert long <= 2.2 * short
    assert long < 60 * 6000


def test_a_decoder_that_takes_quadratic_time_is_refused_long_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = PolicyTokenizer(word_piece(), NUM_ROWS, [])
    monkeypatch.setattr(codec, "_offsets_by_windows", lambda ids, **_: None)
    monkeypatch.setattr(codec, "_offsets_by_runs", lambda ids: None)
    assert len(codec.decode([1] * 4096).ids) == 4096
    with pytest.raises(CodecError, match="4097 token ids of a decoder"):
        codec.decode([1] * 4097)


# --- where the library does not follow the rule -----------------------------------------------------
# If one of these fails, a new version of tokenizers may replace code of ours.


def library_offsets(tokenizer: PreTrainedTokenizerFast, text: str) -> list[tuple[int, int]]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets)


def test_the_library_gives_the_mark_of_a_word_to_the_first_character() -> None:
    # Tokens: ▁ and three bytes of 茶.
    assert library_offsets(byte_fallback(), "茶") == [(0, 1), (0, 1), (0, 1), (0, 1)]
    assert CODECS["byte_fallback"].encode_text("茶").offsets == [(0, 0), (0, 1), (0, 1), (0, 1)]


def test_the_library_gives_each_byte_of_unigram_the_whole_run() -> None:
    assert library_offsets(TOKENIZERS["unigram"], "a茶便")[1:] == [(1, 3)] * 6
    assert CODECS["unigram"].encode_text("a茶便").offsets[1:] == [(1, 2)] * 3 + [(2, 3)] * 3


def test_the_library_leaves_out_the_space_that_word_piece_decodes() -> None:
    tokenizer = word_piece()
    assert library_offsets(tokenizer, "tea cheap") == [(0, 3), (4, 9)]
    codec = PolicyTokenizer(tokenizer, NUM_ROWS, [])
    assert codec.encode_text("tea cheap").offsets == [(0, 3), (3, 9)]


def streamed(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str | None]:
    """Text of each token from `DecodeStream`."""
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer.backend_tokenizer, token_id) for token_id in ids]


def test_the_librarys_stream_does_not_say_which_token_has_which_text() -> None:
    # " –" is two tokens: a space with the first byte, then the other bytes.
    tokenizer = TOKENIZERS["byte_level"]
    ids = ids_of(tokenizer, "x –")
    assert streamed(tokenizer, ids) == ["x", None, " –"]
    assert CODECS["byte_level"].decode(ids).offsets == [(0, 1), (1, 3), (2, 3)]


def test_the_librarys_stream_drops_an_incomplete_end() -> None:
    ids = spelling("byte_level", b"t", b"\xe8", b"\x8c")
    assert streamed(TOKENIZERS["byte_level"], ids) == ["t", None, None]
    assert CODECS["byte_level"].decode(ids).text == "t\ufffd"


def test_the_librarys_stream_raises_for_broken_bytes() -> None:
    ids = spelling("byte_fallback", b"\xe8", b"\x8c", b"\x8c", b"\xe8", b"t")
    with pytest.raises(Exception, match="Invalid prefix encountered"):
        streamed(TOKENIZERS["byte_fallback"], ids)
    assert CODECS["byte_fallback"].decode(ids).text == "\ufffd" * 4 + "t"


# --- the codec --------------------------------------------------------------------------------------


def test_end_tokens() -> None:
    tokenizer = byte_level()
    [im_end], [end_of_text] = ids_of(tokenizer, "<|im_end|>"), ids_of(tokenizer, "<|endoftext|>")
    ids = [im_end, end_of_text, im_end]
    codec = PolicyTokenizer(tokenizer, NUM_ROWS, ids)
    assert codec.end_tokens == ("<|im_end|>", "<|endoftext|>")
    assert codec.num_ids == NUM_ROWS
    assert PolicyTokenizer(tokenizer, NUM_ROWS, []).end_tokens == ()


def test_truncation_and_padding_of_a_tokenizer_json_do_nothing() -> None:
    backend = Tokenizer.from_str(byte_level_json())
    backend.enable_truncation(4)
    backend.enable_padding(length=64, pad_token="<|endoftext|>")
    tokenizer = wrapped(backend)
    assert len(ids_of(tokenizer, "便宜的茶")) == 64  # as loaded: 4 tokens and padding
    codec = PolicyTokenizer(tokenizer, NUM_ROWS, [])
    expected = CODECS["byte_level"].encode_text("便宜的茶")
    assert codec.encode_text("便宜的茶") == expected
    chat = [Message(role="user", content="便宜的茶" * 20)]
    assert codec.encode_chat(chat) == CODECS["byte_level"].encode_chat(chat)


def test_threads_may_share_a_tokenizer() -> None:
    codec = CODECS["byte_level"]
    chats = [[Message(role="user", content=f"{i} 便宜的茶 🍵" * i)] for i in range(40)]

    def work(chat: Sequence[Message]) -> tuple[list[int], Tokens]:
        return codec.encode_chat(chat), codec.encode_text(chat[0].content)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, chats)) == list(map(work, chats))


def test_slow_tokenizer_is_refused() -> None:
    class SlowTokenizer(PreTrainedTokenizer):
        vocab_size = 1

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(CodecError, match=r"SlowTokenizer has no offsets; a tokenizer\.json is needed"):
        PolicyTokenizer(SlowTokenizer(), 1, [])  # type: ignore[no-untyped-call]


# --- chats ------------------------------------------------------------------------------------------


def test_chat_goes_through_the_template() -> None:
    chat = [Message(role="system", content="Shop."), Message(role="user", content="茶 <|im_end|>")]
    templated = (
        "<|im_start|>system\nShop.<|im_end|>\n"
        "<|im_start|>user\n茶 <|im_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert CODECS["byte_level"].encode_chat(chat) == ids_of(byte_level(), templated)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "chat_template is not set"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages[7].content }}", "has no"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_template_that_fails_refuses_the_messages(template: str | None, message: str) -> None:
    tokenizer = wrapped(Tokenizer.from_str(byte_level_json()), chat_template=template)
    codec = PolicyTokenizer(tokenizer, NUM_ROWS, [])
    with pytest.raises(CodecError, match="the policy's chat template refuses the messages: ") as info:
        codec.encode_chat([Message(role="user", content="hi")])
    assert message in str(info.value)


# --- special tokens of text prompts -------------------------------------------------------------------


def with_bos(*, eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that adds a BOS to texts, like Llama 3's; with `eos` also an end, like T5's."""
    backend = Tokenizer.from_str(byte_level_json())
    ids = {name: backend.token_to_id(name) for name in ("<|endoftext|>", "<|im_end|>")}
    end = " <|im_end|>" if eos else ""
    backend.post_processor = processors.TemplateProcessing(
        single=f"<|endoftext|> $A{end}", special_tokens=list(ids.items())
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )


def encoded(
    tokenizer: PreTrainedTokenizerFast, text: str, add_special_tokens: bool | None
) -> tuple[list[int], list[str]]:
    warnings: list[ScoreWarning] = []
    options = PromptOptions(add_special_tokens=add_special_tokens)
    ids = PolicyTokenizer(tokenizer, NUM_ROWS, []).encode_prompt(text, options, warnings.append)
    return list(ids), [warning.code.value for warning in warnings]


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("text", ["green tea", "茶", ""])
def test_special_tokens_are_those_of_the_tokenizer(text: str, eos: bool) -> None:
    tokenizer = with_bos(eos=eos)
    bos = ids_of(tokenizer, "<|endoftext|>")
    assert encoded(tokenizer, text, True) == (list(tokenizer(text)["input_ids"]), [])
    assert encoded(tokenizer, text, True)[0][:1] == bos
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert encoded(tokenizer, text, False) == (plain, [])
    assert encoded(tokenizer, text, None) == (plain, ["no_bos"])


@pytest.mark.parametrize("add", [None, False, True])
def test_there_are_never_two_bos(add: bool | None) -> None:
    tokenizer = with_bos()
    text = "<|endoftext|>green tea"
    assert encoded(tokenizer, text, add) == (ids_of(tokenizer, text), [])
    assert list(tokenizer(text)["input_ids"])[:2] == ids_of(tokenizer, "<|endoftext|>") * 2  # the library's


@pytest.mark.parametrize("add", [None, False, True])
def test_a_tokenizer_without_bos_adds_none(add: bool | None) -> None:
    assert encoded(byte_level(), "green tea", add) == (ids_of(byte_level(), "green tea"), [])
